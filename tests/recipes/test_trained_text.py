"""An evaluation takes what the training held out, and never what it trained on."""

import json

import datasets
import pytest

from sparse_prune.recipes.causal_lm.documents import split_text
from sparse_prune.recipes.causal_lm.trained_text import describe_split, unseen_documents

TEXT = " ".join(f"{number:04d}" for number in range(1000))
HELD_OUT = "the part that the training held out"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    (tmp_path / "many").mkdir()
    for number in range(60):
        (tmp_path / "many" / f"{number}.txt").write_text(f"file {number}")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {number}"}) for number in range(60)))
    return tmp_path


@pytest.mark.parametrize("text", ["one.txt", "many", "many/*.txt", "rows.jsonl", ["one.txt", "rows.jsonl"]])
def test_of_the_text_of_the_training_the_held_out_part_is_taken(folder, text):
    trained = {name: list(documents) for name, documents in split_text(text, 0.2, 3).items()}
    told = json.loads(json.dumps(describe_split(text, 0.2, 3)))
    assert str(folder) not in str(told)
    found, part = unseen_documents(text, told)
    assert (list(found), part) == (trained["test"], HELD_OUT)
    written_otherwise = [f"{folder}/{name}" for name in ([text] if isinstance(text, str) else text)]
    found, part = unseen_documents(written_otherwise, told)
    assert (list(found), part) == (trained["test"], HELD_OUT)
    assert trained["test"]
    assert not set(trained["test"]) & set(trained["train"])


def test_collections_are_split_whoever_asks():
    found, part = unseen_documents(["hub:rows.jsonl", "other.txt"], None)
    assert list(found) == [*split_text("rows.jsonl")["test"], TEXT[::-1]]
    assert part.startswith("of hub:rows.jsonl the part that causal_lm holds out; all of it; the export does not tell")


def test_other_text_is_taken_whole():
    told = describe_split("one.txt", 0.1, 0)
    found, part = unseen_documents("other.txt", told)
    assert (list(found), part) == ([TEXT[::-1]], "all of it")


@pytest.mark.parametrize(
    ("trained", "given"),
    [
        ("many", "many/3.txt"),
        ("many/3.txt", "many"),
        ("one.txt", ["one.txt", "other.txt"]),
        (["one.txt", "many"], "many"),
    ],
)
def test_a_part_of_the_text_of_the_training_is_refused(trained, given):
    with pytest.raises(ValueError, match="must be all of the text that the model was trained on, .* Name it as"):
        unseen_documents(given, describe_split(trained, 0.1, 0))
