"""Labelled text, padded to one length."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from sparse_prune.recipes.base.classification import (
    ClassificationDataModule,
    Example,
    in_order,
    split_by_name,
    warn_of_rare_classes,
)
from sparse_prune.recipes.base.counts import check_counts
from sparse_prune.recipes.base.hub import PREFIX, hub_classes, hub_rows
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.base.sources import stdlib_sources

_TABLES = "encodings"  # a package of tables, not of text
_STDLIB_CLASSES = 8
Documents = dict[str, dict[str, str]]
"""Label -> name -> text."""


class LabelledTextDataModule(ClassificationDataModule):
    """Chunks of labelled documents. Whole documents are held out; classes take turns, so that they are balanced.

    Args:
        tokenizer: A model, as `locate` takes it.
        data: "stdlib" (from which of the largest packages of the Python standard library do these lines come?), a .csv
            or .jsonl file with the columns text and label, or `hub:NAME[:CONFIG[:TEXT[:LABEL]]]` for the training split
            of a hub data set, or of a folder that holds the like (`hub_rows`).
        max_length: Tokens of an example, special tokens included; at most the model's. Shorter ones are padded.
        batch_size: Examples per batch.
        train_examples: Most examples to train on.
        val_examples: Most examples of the validation documents.
        test_examples: Most examples of the test documents.
        chunks_per_document: Most examples of one document; the rest of a longer one is left out.
        held_out_share: Share of a class's documents in validation and in test, each, in (0, 0.5); a class of fewer than
            three documents is only trained on.
        seed: Order of the training examples.

    Raises:
        FileNotFoundError: If the file or the data set is not there.
        ValueError: If a number is out of range, or a column, a text or a label is missing.
    """

    def __init__(
        self,
        tokenizer: str,
        data: str = "stdlib",
        max_length: int = 256,
        batch_size: int = 16,
        train_examples: int = 2000,
        val_examples: int = 200,
        test_examples: int = 400,
        chunks_per_document: int = 16,
        held_out_share: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, {"train": train_examples, "val": val_examples, "test": test_examples}, seed)
        check_counts(max_length=max_length, chunks_per_document=chunks_per_document)
        self.tokenizer_name, self.data, self.max_length = tokenizer, data, max_length
        self.chunks_per_document, self.held_out_share = chunks_per_document, held_out_share

    @cached_property
    def documents(self) -> Documents:
        """Label -> name -> text."""
        found = load_labelled(self.data)
        warn_of_rare_classes({label: len(documents) for label, documents in found.items()})
        return found

    @property
    @override
    def classes(self) -> list[str]:
        return list(self.documents)

    @override
    def make(self, split: str, count: int) -> list[Example]:
        tokenizer = load_tokenizer(self.tokenizer_name)
        classes = []
        for label, documents in enumerate(self.documents.values()):
            names = split_by_name(list(documents), self.held_out_share)[split]
            classes.append(self._examples(tokenizer, [documents[name] for name in names], label))
        return list(islice(_in_turns(classes), count))

    def _examples(self, tokenizer: object, texts: list[str], label: int) -> Iterator[Example]:
        """Chunks of a class's documents, one of each document in turn."""
        chunks = [islice(self._chunks(tokenizer, text), self.chunks_per_document) for text in texts]
        return (chunk | {"labels": torch.tensor(label)} for chunk in _in_turns(chunks))

    def _chunks(self, tokenizer: object, text: str) -> Iterator[Example]:
        encoded = tokenizer(  # type: ignore[operator]
            text,
            max_length=self.max_length,
            truncation=True,
            padding="max_length",
            return_overflowing_tokens=True,
            return_tensors="pt",
            verbose=False,
        )
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
            yield {"input_ids": ids, "attention_mask": mask}


def _in_turns(queues: Sequence[Iterator[Example]]) -> Iterator[Example]:
    """One of each, round after round, until all are empty."""
    for taken in zip_longest(*queues):
        yield from (example for example in taken if example is not None)


def load_labelled(data: str) -> Documents:
    """Label -> name -> text, in the order of the classes; see `LabelledTextDataModule` for what `data` may be."""
    if data.startswith(PREFIX):
        rows, (text, label) = hub_rows(data, ["text", "label"], "data")
        classes, numbers = hub_classes(rows, label, "data")
        found = _by_label([(classes[number], words) for number, words in zip(numbers, rows[text], strict=True)])
        return {name: found.get(name, {}) for name in classes}
    found = _stdlib() if data == "stdlib" else _by_label(_read(Path(data).expanduser()))
    return {label: found[label] for label in in_order(found)}


def _by_label(rows: list[tuple[Any, Any]]) -> Documents:
    """Of pairs of label and text; rows with a blank text are left out."""
    found: Documents = defaultdict(dict)
    for index, (label, text) in enumerate(rows):
        if text is None or label is None or not str(label).strip():
            missing = "text" if text is None else "label"
            raise ValueError(
                f"`data` must have a text and a label in every row, got no {missing} in row {index + 1}. "
                "Fill it in, or take the row out."
            )
        if str(text).strip():
            found[str(label)][str(index)] = str(text)
    return found


def _read(path: Path) -> list[tuple[Any, Any]]:
    """Label and text of every row."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"`data` must be 'stdlib', hub:NAME, or a .csv or .jsonl file, got {str(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"`data` must be an existing file, got {str(path)!r}. Check the path.")
    limit = csv.field_size_limit(sys.maxsize)  # documents may be longer than 131072 characters
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file)))
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"`data` must be a table in UTF-8, got {str(path)!r}: {error}. Save it anew as {path.suffix} in UTF-8."
        ) from error
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=1):
        if "text" not in row or "label" not in row:
            raise ValueError(f"`data` must have the columns text and label, got {sorted(row)} in row {number}.")
    return [(row["label"], row["text"]) for row in rows]


def _stdlib() -> Documents:
    """The packages with the most files."""
    files = {name: file for name, file in stdlib_sources().items() if _TABLES not in Path(name).parts}
    largest = Counter(Path(name).parts[0] for name in files if len(Path(name).parts) > 1).most_common(_STDLIB_CLASSES)
    found: Documents = {package: {} for package, _ in largest}
    for name, file in sorted(files.items()):
        text = file.read_text(encoding="utf-8", errors="replace")
        if Path(name).parts[0] in found and text.strip():
            found[Path(name).parts[0]][name] = text
    return found
