"""The data module of labelled text, padded to one length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

import torch
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.classification import (
    ClassificationDataModule,
    Example,
    split_by_name,
    warn_of_rare_classes,
)
from sparse_prune.recipes.base.labels import numbered
from sparse_prune.recipes.base.plain_text import read_text
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.base.rows import data_rows, is_data_set
from sparse_prune.recipes.base.sources import files_by_class, stdlib_documents
from sparse_prune.recipes.base.tables import SUFFIXES

_TABLES = "encodings"  # a package of tables, not of text
_STDLIB_CLASSES = 8
Documents = dict[str, dict[str, str]]
"""Label -> name -> text."""


class LabelledTextDataModule(ClassificationDataModule):
    """Chunks of labelled documents. Whole documents are held out; classes take turns, so that splits are balanced.

    Args:
        tokenizer: A model, as `locate` takes it.
        data: "stdlib" (classify lines by their package in the Python standard library), a folder with one folder of
            text files per class, or `NAME[:CONFIG[:TEXT[:LABEL]]]` for a table or the training split of a data set
            (`data_rows`).
        max_length: Tokens of an example, special tokens included; at most the model's. Shorter ones are padded.
        batch_size: Examples per batch.
        train_examples: Most examples to train on.
        val_examples: Most examples of the validation documents.
        test_examples: Most examples of the test documents.
        chunks_per_document: Most examples of one document; the rest of a longer one is left out.
        held_out_share: Share of a class's documents in validation and in test, each, in (0, 0.5); a class of fewer than
            three documents is only trained on.
        seed: Seed of the order of the training examples.

    Raises:
        FileNotFoundError: If the file or the data set does not exist.
        ValueError: If a number is out of range, a column or a label is missing, or a file is not text.
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
        check_range("[1, inf)", max_length=max_length, chunks_per_document=chunks_per_document)
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
        tokenizer = load_tokenizer(self.tokenizer_name, padding=True)
        classes = []
        for label, documents in enumerate(self.documents.values()):
            names = split_by_name(list(documents), self.held_out_share)[split]
            classes.append(self._examples(tokenizer, [documents[name] for name in names], label))
        return list(islice(_in_turns(classes), count))

    def _examples(self, tokenizer: object, texts: list[str], label: int) -> Iterator[Example]:
        """Yield chunks of a class's documents, one of each document in turn."""
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
    """Take one example of each queue, round after round, until all are empty."""
    for taken in zip_longest(*queues):
        yield from (example for example in taken if example is not None)


def load_labelled(data: str) -> Documents:
    """Load the `data` of a `LabelledTextDataModule`: label -> name -> text, in the order of the classes."""
    root = Path(data).expanduser()
    if data == "stdlib":
        return _stdlib()
    if is_data_set(data):
        rows = data_rows(data, ["text", "label"], "data")
        classes, numbers = rows.classes()
        return _by_label(classes, [(numbers[row], str(row), str(text)) for row, text in rows.documents()])
    if root.is_dir():
        files = files_by_class(root)
        classes, numbers = numbered([label for label, _ in files], "data")
        names = [(number, str(file.relative_to(root)), file) for number, (_, file) in zip(numbers, files, strict=True)]
        texts = [(number, name, read_text(file, "data")) for number, name, file in names]
        return _by_label(classes, [entry for entry in texts if entry[2].strip()])
    wanted = (
        f"`data` must be 'stdlib', hub:NAME, a table ({SUFFIXES}) or a folder with a folder of text files per class"
    )
    if root.exists():
        raise ValueError(f"{wanted}, got {data!r}. Save it as one of these.")
    raise FileNotFoundError(f"{wanted}, got {data!r}, which does not exist. Check the path.")


def _by_label(classes: Sequence[str], texts: Sequence[tuple[int, str, str]]) -> Documents:
    """Group documents, given as number of the class, name and text."""
    found: Documents = {name: {} for name in classes}
    for number, name, text in texts:
        found[classes[number]][name] = text
    return found


def _stdlib() -> Documents:
    """Return the documents of the packages with the most files."""
    files = {name: text for name, text in stdlib_documents().items() if _TABLES not in Path(name).parts}
    largest = Counter(Path(name).parts[0] for name in files if len(Path(name).parts) > 1).most_common(_STDLIB_CLASSES)
    found: Documents = {package: {} for package in sorted(name for name, _ in largest)}
    for name, text in sorted(files.items()):
        if Path(name).parts[0] in found and text.strip():
            found[Path(name).parts[0]][name] = text
    return found
