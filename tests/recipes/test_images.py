"""Images as users have them, the same whichever way they are named."""

import csv

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Image
from PIL import Image as Pictures
from PIL import TiffImagePlugin

from sparse_prune.recipes.vision.data import ImageDataModule
from sparse_prune.recipes.vision.images import load_images
from support.data_sets import pictures, write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `datasets` keeps what it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def put(picture, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, **options)


def test_sixteen_bits_keep_their_scale(tmp_path):
    values = np.linspace(0, 65535, 63).reshape(7, 9)
    fractions = (values / 65535).astype(np.float32)
    for name in ("16.png", "16.tif"):
        put(Pictures.fromarray(values.astype(np.uint16)), tmp_path / "set" / "a" / name)
    signed = TiffImagePlugin.ImageFileDirectory_v2()
    signed[339] = (2,)
    put(Pictures.fromarray((values // 2).astype(np.uint16)), tmp_path / "set" / "a" / "signed.tif", tiffinfo=signed)
    (tmp_path / "set" / "a" / "16.pgm").write_bytes(b"P5 9 7 65535\n" + values.astype(">u2").tobytes())
    put(Pictures.fromarray(fractions), tmp_path / "set" / "b" / "float.tif")
    put(Pictures.fromarray((values / 257).astype(np.uint8)), tmp_path / "set" / "b" / "8.png")
    found = load_images(str(tmp_path / "set"))
    for place, path in enumerate(found.images):
        image = found.read(place)
        assert image.shape == ((7, 9, 3) if path.name == "8.png" else (7, 9))
        np.testing.assert_allclose(image if image.ndim == 2 else image[..., 0], fractions, atol=1 / 255)
    put(Pictures.fromarray(fractions * 9), tmp_path / "set" / "b" / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.*values from 0 to 9, beyond 0 to 1"):
        load_images(str(tmp_path / "set")).check(range(6))


@pytest.mark.parametrize("largest", [200, 60000, 10**6])
def test_integers_of_32_bits_are_refused_as_they_do_not_tell_their_white(tmp_path, largest):
    for label in "ab":
        values = np.linspace(0, largest, 63).reshape(7, 9).astype(np.int32)
        put(Pictures.fromarray(values), tmp_path / "set" / label / "0.tif")
    for name in (str(tmp_path / "set"), f"hub:{tmp_path / 'set'}"):
        found = load_images(name)
        wanted = (
            r"must hold images that can be read, got '.*0\.tif'.*integers of 32 bits, .*: save them as 8 or 16 bits"
        )
        with pytest.raises(ValueError, match=wanted):
            found.read(0)
        with pytest.raises(ValueError, match=wanted):
            found.check(range(2))


def test_images_stand_as_their_camera_was_held(tmp_path):
    left = np.zeros((8, 16, 3), np.uint8)
    left[:, :8] = 255
    turned = Pictures.fromarray(np.rot90(left).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    for label in "ab":
        put(turned, tmp_path / "set" / label / "0.png", exif=exif)
    rows = {
        "image": [{"path": str(tmp_path / "set" / label / "0.png"), "bytes": None} for label in "ab"],
        "label": [0, 1],
    }
    packed = write(tmp_path / "packed", rows, {"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for name in (str(tmp_path / "set"), f"hub:{tmp_path / 'set'}", packed, f"hub:{packed}"):
        found = load_images(name)
        for place in range(2):
            np.testing.assert_array_equal(found.read(place), left / np.float32(255))


def test_classes_are_the_first_folders_of_the_training_split(tmp_path, caplog):
    caplog.set_level("INFO", "sparse_prune")
    (one, *_) = pictures(1)
    for name in (
        "cat/a/0.png",
        "cat/b/0.JPG",
        "dog/1.gif",
        "dog/.ipynb_checkpoints/2.png",
        "dog/._1.png",
        "__MACOSX/0.png",
    ):
        put(one, tmp_path / "nested" / name)
        put(one, tmp_path / "split" / "train" / name)
    put(one, tmp_path / "split" / "val" / "bird" / "0.png")
    (tmp_path / "nested" / "dog" / "notes.txt").touch()
    for name in ("nested", "split"):
        for place in (str(tmp_path / name), f"hub:{tmp_path / name}"):
            found = load_images(place)
            assert (found.classes, found.numbers) == (["cat", "dog"], [0, 0, 1])
    assert "Hidden files are left out: 3 in" in caplog.text
    assert "split, train is read, of which a share is held out; left out: val." in caplog.text
    assert "Files without a suffix of images are left out: 1 in" in caplog.text


def test_a_table_beside_images_says_their_classes(tmp_path):
    for index, picture in enumerate(pictures(4)):
        put(picture, tmp_path / "set" / "train" / f"{index}.png")
    with open(tmp_path / "set" / "train" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *((f"{index}.png", "xy"[index % 2]) for index in range(4))])
    for name in (str(tmp_path / "set"), f"hub:{tmp_path / 'set'}"):
        found = load_images(name)
        assert (found.classes, found.numbers) == (["x", "y"], [0, 1, 0, 1])
        assert found.read(0).shape == (7, 9, 3)


def test_broken_files_are_refused_before_the_first_step_however_named(tmp_path):
    for label in "ab":
        for index, picture in enumerate(pictures(4)):
            put(picture, tmp_path / "set" / label / f"{index}.png")
    for index in range(4):
        (tmp_path / "set" / "a" / f"{index}.png").write_bytes(b"\x89PNG")
    for name in (str(tmp_path / "set"), f"hub:{tmp_path / 'set'}"):
        with pytest.raises(
            ValueError, match=r"`data` must hold images that can be read, got '.*/a/\d\.png' \(cannot ide"
        ):
            ImageDataModule(name, image_size=4).setup("fit")
