"""Data sets of the hub, from folders that hold the same: nothing of `datasets` is replaced."""

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Image, Sequence, Value

from sparse_prune.commands.evaluate.cli import held_out
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.base.rows import data_rows
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.documents import split_documents
from sparse_prune.recipes.text_classification.data import load_labelled
from sparse_prune.recipes.vision.cli import main as vision
from sparse_prune.recipes.vision.data import ImageDataModule
from sparse_prune.recipes.vision.images import load_images
from support.data_sets import pictures, write, write_opinions, write_pictures
from support.settings import pruning_callbacks, run_settings

DISHES = ["waffles", "apple_pie", "sushi"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `datasets` keeps what it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def food(tmp_path):
    return f"hub:{write_pictures(tmp_path / 'food', [0, 1, 2] * 8, DISHES)}"


def test_images_have_the_names_and_the_order_of_their_feature(food):
    data = ImageDataModule(food, image_size=7, held_out_share=0.25, mean=0.0, std=1.0)
    data.setup("fit")
    assert data.classes == DISHES
    assert {split: len(examples) for split, examples in data.examples.items()} == {"train": 12, "val": 6, "test": 6}
    assert [int(data.examples["val"][index]["labels"]) for index in range(6)] == [0, 1, 2, 0, 1, 2]
    originals = [np.asarray(picture, dtype=np.float32) / 255.0 for picture in pictures(24)]
    for place, original in enumerate(originals):
        np.testing.assert_array_equal(data.images.read(place), original)
    seen = {tuple(example["pixel_values"].flatten().tolist()) for split in data.examples.values() for example in split}
    assert len(seen) == 24


def test_an_image_is_read_once_per_epoch_and_none_before(food, monkeypatch):
    from PIL import Image as Pictures

    opened = []
    original = Pictures.open
    monkeypatch.setattr(Pictures, "open", lambda *args, **options: opened.append(1) or original(*args, **options))
    data = ImageDataModule(food, image_size=4, batch_size=5)
    data.setup("fit")
    assert data.classes == DISHES
    assert not opened
    for epoch in (1, 2):
        assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == len(data.examples["train"])
        assert len(opened) == epoch * len(data.examples["train"])


def test_images_that_are_no_images_fail_where_they_are_read(tmp_path):
    columns = {"image": [{"bytes": b"none", "path": None}] * 6, "label": [0, 1] * 3}
    folder = write(tmp_path / "food", columns, {"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = ImageDataModule(f"hub:{folder}", image_size=4)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"images that can be read, got row \d \(None\): cannot identify image"):
        data.examples["train"][0]


def test_workers_read_what_the_training_would(food):
    alone = ImageDataModule(food, image_size=4, batch_size=4)
    helped = ImageDataModule(food, image_size=4, batch_size=4, num_workers=2)
    for data in (alone, helped):
        data.setup("fit")
    loader = helped.train_dataloader()
    assert loader.persistent_workers
    for _ in range(2):
        for one, other in zip(alone.train_dataloader(), loader, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])
    # What a worker that is spawned gets.
    examples = pickle.dumps(helped.examples["train"])
    assert len(examples) < 10_000
    assert torch.equal(pickle.loads(examples)[3]["pixel_values"], alone.examples["train"][3]["pixel_values"])
    with pytest.raises(ValueError, match="`num_workers` must be at least 0, got -1"):
        ImageDataModule(food, num_workers=-1)


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_workers(food, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe"])
    data = {"data": food, "image_size": 16, "batch_size": 1, "num_workers": 2}
    model = {"patch_size": 4, "width": 8, "layers": 1, "heads": 2, "learning_rate": 0.01}

    def losses(name, steps, *more):
        # 18 images are 18 batches; a layer that never settles is not timed.
        settings = run_settings(tmp_path / name, model, data, pruning_callbacks(8, 0.4, patience=99), steps)
        settings["trainer"] |= {"val_check_interval": 5, "check_val_every_n_epoch": None, "enable_checkpointing": True}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        vision(["fit", "--config", str(path), *more])
        report = json.loads((tmp_path / name / "report.json").read_text())
        return [record["loss"] for record in report["records"]], report["loss"]

    whole = losses("whole", 12)
    losses("broken", 5)
    (checkpoint,) = (tmp_path / "broken" / "checkpoints").iterdir()
    assert losses("resumed", 12, f"--ckpt_path={checkpoint}") == whole


def test_a_folder_of_images_is_a_data_set_too(tmp_path):
    for name in ("pie", "cake"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        for index, picture in enumerate(pictures(3)):
            picture.save(tmp_path / "set" / "train" / name / f"{index}.png")
    found = load_images(f"hub:{tmp_path / 'set'}")
    assert found.classes == ["cake", "pie"]
    assert sorted(found.numbers) == [0, 0, 0, 1, 1, 1]
    assert found.read(0).shape == (7, 9, 3)


def test_classes_without_rows_keep_their_numbers_and_rare_ones_are_trained_on(tmp_path, caplog):
    names = ["none", "rare", "b", "a"]
    numbers = [1, 2, 2, 2, 2, 3, 3, 3, 3]
    data = ImageDataModule(f"hub:{write_pictures(tmp_path / 'food', numbers, names)}", image_size=4)
    data.setup("fit")
    assert data.classes == names
    labels = {split: sorted(int(example["labels"]) for example in found) for split, found in data.examples.items()}
    assert labels == {"train": [1, 2, 2, 3, 3], "val": [2, 3], "test": [2, 3]}
    assert "none (0), rare (1)" in caplog.text
    text = write_opinions(tmp_path / "law", list("vwxyz"), [1, 1, 3, 3, 3], names)
    documents = load_labelled(f"hub:{text}:scotus")
    assert list(documents) == names
    assert documents["rare"] == {"0": "v", "1": "w"}
    assert documents["none"] == {}


def test_rows_without_a_label_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a label in every row, got none \(-1\) in 2 of 4 rows, .* row 2"):
        load_images(f"hub:{write_pictures(tmp_path / 'food', [0, -1, 1, -1], ['a', 'b'])}")
    rows = {"text": list("abc"), "label": ["x", None, "y"]}
    folder = write(tmp_path / "law", rows, {"text": Value("string"), "label": Value("string")})
    with pytest.raises(ValueError, match=r"got none in 1 of 3 rows, the first of them row 2"):
        load_labelled(f"hub:{folder}")
    # Where numbers are not said to be classes, -1 may be one.
    rows = {"text": list("abc"), "label": [1, -1, 0]}
    folder = write(tmp_path / "mood", rows, {"text": Value("string"), "label": Value("int64")})
    assert load_labelled(f"hub:{folder}") == {"-1": {"1": "b"}, "0": {"2": "c"}, "1": {"0": "a"}}


def test_columns_are_named_and_checked(tmp_path):
    rows = {"words": ["hello"], "text": ["x"], "label": [1], "tags": [[1, 2]]}
    features = {"words": Value("string"), "text": Value("string"), "label": Value("int64")}
    folder = write(tmp_path / "with:colon", rows, features | {"tags": Sequence(Value("int64"))})
    assert load_labelled(f"hub:{folder}::words") == {"1": {"0": "hello"}}
    assert load_labelled(f"hub:{folder}") == {"1": {"0": "x"}}
    with pytest.raises(ValueError, match=r"`data` must name a column of '.*colon', one of .*'words', .*got 'none'"):
        load_labelled(f"hub:{folder}::text:none")
    for columns, kind in (("label", "text"), ("text:tags", "label")):
        with pytest.raises(ValueError, match=f"`data` must name a column that holds one {kind} a row, got"):
            load_labelled(f"hub:{folder}::{columns}")
    with pytest.raises(ValueError, match="a column that holds one image a row, got 'text'"):
        load_images(f"hub:{folder}::text")
    with pytest.raises(ValueError, match=r"must be hub:NAME.* at most 2 columns \(text, label\)"):
        load_labelled(f"hub:{folder}:default:text:label:more")


def test_streamed_files_without_features_are_checked_by_their_first_row(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"words": "x"}\n{"words": "y"}\n')
    rows = data_rows(f"hub:{tmp_path / 'set'}::words", ["text"], "text", stream=True)
    assert list(rows.documents()) == [(0, "x"), (1, "y")]
    with pytest.raises(ValueError, match=r"`text` must name a column of .*one of \['words'\], got 'text'"):
        data_rows(f"hub:{tmp_path / 'set'}", ["text"], "text", stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_load_is_refused_with_the_remedy(tmp_path, monkeypatch, stream):
    def refused(error, match, name):
        with pytest.raises(error, match=match) as caught:
            data_rows(f"hub:{name}", ["text"], "text", stream)
        assert str(caught.value).startswith(
            "`text` must name a data set of the hub, or a folder of files, with a split "
        )
        assert caught.value.__cause__ is not None

    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").touch()
    refused(ValueError, r"which is a loading script \(.*\)\. Name a copy in Parquet", tmp_path / "script")
    refused(FileNotFoundError, r"which does not exist.*Check the name", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused(FileNotFoundError, r"holds no data", tmp_path / "empty")
    for config in "ab":
        write(tmp_path / "two", {"text": ["x"]}, {"text": Value("string")}, config=config)
    refused(ValueError, r"available configs: \['a', 'b'\](.|\n)*Name a configuration", tmp_path / "two")
    refused(ValueError, r"got '.*two:c'.*Available: \['a', 'b'\]", f"{tmp_path / 'two'}:c")
    rows = data_rows(f"hub:{tmp_path / 'two'}:b", ["text"], "text", stream)
    assert list(rows.documents()) == [(0, "x")]
    write(tmp_path / "test", {"text": ["x"]}, {"text": Value("string")}, split="test")
    refused(ValueError, r"(?i)split.*train.*\['test'\]", tmp_path / "test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(ConnectionError, r"the hub cannot be reached .*Connect, or copy", "me/data")


class Hub(BaseHTTPRequestHandler):
    """Has one data set: a loading script."""

    def do_HEAD(self):
        there = self.path.startswith("/datasets/me/old/resolve/") and self.path.endswith(("/README.md", "/old.py"))
        self.send_response(200 if there else 404)
        if there:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"0"')
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_says_what_it_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match=r"`data` must name .* got 'me/none', which does not exist"):
        load_labelled("hub:me/none")
    with pytest.raises(ValueError, match=r"got 'me/old', which is a loading script \(.*old.py\)"):
        load_labelled("hub:me/old")


@pytest.fixture
def web(tmp_path):
    """Text in two files, of which the second cannot be read."""
    texts = [None if index == 5 else " " if index == 6 else f"{index:03d}" * 20 for index in range(300)]
    folder = write(tmp_path / "web", {"text": texts}, {"text": Value("string")})
    (tmp_path / "web" / "train-00000-of-00001.parquet").rename(tmp_path / "web" / "train-00000-of-00002.parquet")
    (tmp_path / "web" / "train-00001-of-00002.parquet").write_text("not Parquet")
    return f"hub:{folder}"


def test_of_text_only_what_is_needed_is_read(web, cache, tiny_model):
    counts = {"train_sequences": 20, "val_sequences": 4, "test_sequences": 4}
    data = TextDataModule(tiny_model, web, context_length=61, held_out_share=0.2, **counts)
    data.setup("fit")
    assert not list(cache.glob("**/*.arrow"))
    tokenizer = load_tokenizer(tiny_model)
    read = {
        split: [tokenizer.decode(row[:3]).replace(" ", "") for row in rows] for split, rows in data.sequences.items()
    }
    assert {split: len(rows) for split, rows in read.items()} == {"train": 20, "val": 4, "test": 4}
    names = {str(index): f"{index:03d}" for index in range(300) if index not in (5, 6)}
    for split, documents in split_documents(names, 0.2).items():
        assert read[split] == sorted(documents)[: len(read[split])]


def test_evaluation_takes_the_rows_that_the_training_leaves_out(web, tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    ids, _ = held_out(tokenizer, web, 61, 10)
    expected = split_documents({str(index): f"{index:03d}" for index in range(300)})["test"]
    assert [tokenizer.decode(row[:3]).replace(" ", "") for row in ids] == sorted(expected)[:10]
