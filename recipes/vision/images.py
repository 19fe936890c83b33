"""Labelled images, which are read on request."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_prune.recipes.base.labels import numbered
from sparse_prune.recipes.base.rows import PREFIX, data_rows, is_data_set
from sparse_prune.recipes.base.sources import files_by_class
from sparse_prune.words import some

log = logging.getLogger(__name__)
_BROKEN = (OSError, SyntaxError, ValueError)  # Pillow's errors for broken images
_BITS, _SIGNED = 258, 339
"""Tags of TIFF: bits of a sample, and its format, of which 2 is a signed integer."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes. Copies and pickles hold references to files instead of pictures."""

    classes: list[str]
    """Names, in the order of their numbers."""
    numbers: list[int]
    """The class of every image."""
    images: Sequence[Any]
    """Arrays (height, width) in [0, 1], paths, or the column of a data set: `bytes` or a `path` for every image."""

    def places(self) -> list[list[int]]:
        """Return class -> indices of its images, in order."""
        found: list[list[int]] = [[] for _ in self.classes]
        for place, number in enumerate(self.numbers):
            found[number].append(place)
        return found

    def read(self, place: int) -> np.ndarray[Any, Any]:
        """Read an image upright, (height, width) or (height, width, 3), in [0, 1].

        Raises:
            ValueError: If it cannot be read; the message names it.
        """
        image = self.images[place]
        if isinstance(image, np.ndarray):
            return image
        source = _source(image)
        try:
            return _decoded(source)
        except _BROKEN as error:
            name = repr(str(source)) if isinstance(source, Path) else f"row {place + 1} ({image.get('path')})"
            raise ValueError(f"`data` must hold images that can be read, got {name}: {error}. Take it out.") from error

    def check(self, places: Sequence[int]) -> None:
        """Read files once and refuse broken ones; images inside a data set are not checked.

        Raises:
            ValueError: If some cannot be read; the message names the first few.
        """
        broken = []
        for place in places if self._holds_files else ():
            source = _source(self.images[place])
            try:
                _decoded(source)
            except _BROKEN as error:
                broken.append(f"{str(source)!r} ({error})")
        if broken:
            raise ValueError(
                f"`data` must hold images that can be read, got {some(broken, comma='; ')}. Copy them again, or remove "
                "them."
            )

    @property
    def _holds_files(self) -> bool:
        first = self.images[0]
        return not isinstance(first, np.ndarray) and isinstance(_source(first), Path)


def _source(image: Path | Mapping[str, Any]) -> Path | io.BytesIO:
    """Return the file or the bytes of an image."""
    if isinstance(image, Path):
        return image
    return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])


def _decoded(source: Path | io.BytesIO) -> np.ndarray[Any, Any]:
    """Decode an image, rotated as its camera was; values are shares of white (`_white`)."""
    from PIL import Image, ImageOps

    try:
        opened = Image.open(source)
    except Image.DecompressionBombError as error:  # none of the errors that say what is wrong with a file
        raise ValueError(str(error)) from error
    with opened:
        white = _white(opened)
        image = ImageOps.exif_transpose(opened)
        if white is None:
            return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
        values = np.asarray(image, dtype=np.float32) / white
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"values from {values.min() * white:g} to {values.max() * white:g}, beyond 0 to {white:g}")
    return values


def _white(image: Any) -> float | None:
    """Return the value of white by the image's mode in Pillow; None if Pillow brings it to 255.

    Only few formats hold 16 bits as integers of 32. Other integers of 32 bits may be of any scale, and a guess by the
    values would show the images of one data set in several.
    """
    if image.mode == "F":
        return 1.0
    if not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and image.format not in ("PNG", "PPM") and tags.get(_BITS) != (16,):
        raise ValueError("integers of 32 bits, whose value of white is unknown: save them as 8 or 16 bits")
    return 2.0**15 - 1 if tags.get(_SIGNED) == (2,) else 2.0**16 - 1


def load_images(data: str) -> LabelledImages:
    """Load the `data` of an `ImageDataModule`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If there are fewer than two classes. See `data_rows` and `numbered` for data sets.
    """
    root = Path(data.removeprefix(PREFIX)).expanduser()
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        found = LabelledImages(*numbered(digits.target, "data"), list(digits.images / 16.0))
    elif root.is_dir() and not _says_labels(root):
        files = _image_files(root)
        found = LabelledImages(*numbered([label for label, _ in files], "data"), [file for _, file in files])
    elif root.is_dir() or is_data_set(data):
        found = _of_rows(data)
    else:
        raise FileNotFoundError(
            f"`data` must be 'digits', hub:NAME, or an existing folder, got {data!r}. Give one that holds a folder of "
            "images per class."
        )
    if len(found.classes) < 2:
        raise ValueError(
            f"`data` must hold images of at least two classes, got {found.classes} in {data!r}. Give a folder per "
            "class, each with images."
        )
    return found


def _of_rows(data: str) -> LabelledImages:
    from datasets import Image

    rows = data_rows(data, ["image", "label"], "data")
    column = rows.columns[0]
    return LabelledImages(*rows.classes(), rows.data.cast_column(column, Image(decode=False))[column])


def _says_labels(root: Path) -> bool:
    """Whether tables in a folder hold the labels, as Parquet and `metadata.csv` do."""
    return is_data_set(str(root)) or any(root.rglob("metadata.*"))


def _image_files(root: Path) -> list[tuple[str, Path]]:
    """List class and file of the files with suffixes that Pillow reads."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = files_by_class(root)
    images = [(label, file) for label, file in files if file.suffix.lower() in suffixes]
    if len(images) < len(files):
        log.info("Files without a suffix of images are left out: %d in %s.", len(files) - len(images), root)
    return images
