"""Text as sequences of one length, with held-out documents."""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sparse_prune.recipes.base.counts import check_counts
from sparse_prune.recipes.base.hub import PREFIX, hub_rows
from sparse_prune.recipes.base.loader import SPLITS, SplitDataModule
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.base.sources import stdlib_sources
from sparse_prune.recipes.causal_lm.repeats import repeat_passages


class TextDataModule(SplitDataModule):
    """Documents, split by name into training, validation and test, joined by the end-of-text token and cut.

    Whole documents are held out, so no sequence of one split continues a document of another.

    Args:
        tokenizer: A model, as `load_tokenizer` takes it.
        text: "stdlib" (the sources of the Python standard library), files, folders or globs, or
            `hub:NAME[:CONFIG[:COLUMN]]` for the training split of a hub data set, or of a folder that holds the like
            (`hub_rows`). Of such a data set only as many rows are read as are needed, from the first on.
        context_length: Tokens per sequence, at least 2.
        batch_size: Sequences per batch.
        train_sequences: Sequences to train on per epoch.
        val_sequences: Sequences of the validation documents.
        test_sequences: Sequences of the test documents.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents; the rows of a hub data set keep their own.
        repeat_every: Let every n-th training sequence repeat passages (`repeat_passages`), so that pruning sees which
            heads look things up. 0: none.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a number is out of range, nothing is found, or the text is too short.
    """

    def __init__(
        self,
        tokenizer: str,
        text: str | list[str] = "stdlib",
        context_length: int = 2048,
        batch_size: int = 1,
        train_sequences: int = 1000,
        val_sequences: int = 4,
        test_sequences: int = 8,
        held_out_share: float = 0.1,
        seed: int = 0,
        repeat_every: int = 0,
    ) -> None:
        super().__init__(batch_size)
        if context_length < 2:
            raise ValueError(f"`context_length` must be at least 2, a token and the next one, got {context_length}.")
        check_counts(train_sequences=train_sequences, val_sequences=val_sequences, test_sequences=test_sequences)
        if not 0.0 < held_out_share < 0.5:
            raise ValueError(f"`held_out_share` must lie in (0, 0.5), got {held_out_share}.")
        if repeat_every < 0:
            raise ValueError(f"`repeat_every` must be at least 0, got {repeat_every}. 3: every third sequence.")
        self.tokenizer_name, self.text = tokenizer, text
        self.context_length = context_length
        self.wanted = {"train": train_sequences, "val": val_sequences, "test": test_sequences}
        self.held_out_share, self.seed, self.repeat_every = held_out_share, seed, repeat_every
        self.sequences: dict[str, Tensor] = {}
        """Split -> int64, (sequences, context_length)."""

    @override
    def setup(self, stage: str) -> None:
        if self.sequences:
            return
        tokenizer = load_tokenizer(self.tokenizer_name)
        splits = split_text(self.text, self.held_out_share, self.seed)
        for split, count in self.wanted.items():
            purpose = f"for the {split} split"
            self.sequences[split] = cut(tokenizer, splits[split], self.context_length, count, purpose, "context_length")
        if self.repeat_every:
            self.sequences["train"] = repeat_passages(self.sequences["train"], self.repeat_every, self.seed)

    @override
    def examples_of(self, split: str) -> Tensor:
        return self.sequences[split]


def split_text(text: str | list[str], held_out_share: float = 0.1, seed: int = 0) -> Mapping[str, Iterable[str]]:
    """Documents as "train", "val" and "test"; a document stays in its split when others are added.

    Args:
        text: As for `TextDataModule`. A hub data set is read as far as documents are taken; a split once per pass.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents; the rows of a hub data set keep their own.
    """
    if isinstance(text, str) and text.startswith(PREFIX):
        rows, (column,) = hub_rows(text, ["text"], "text", stream=True)
        return {split: _rows_of(split, rows, column, held_out_share) for split in SPLITS}
    return split_documents(load_documents(text), held_out_share, seed)


def _rows_of(split: str, rows: Iterable[Mapping[str, Any]], column: str, held_out_share: float) -> Iterator[str]:
    """A split's documents; blank ones are left out."""
    for index, row in enumerate(rows):
        if _split_of(str(index), held_out_share) == split and (row[column] or "").strip():
            yield row[column]


def split_documents(documents: Mapping[str, str], held_out_share: float = 0.1, seed: int = 0) -> dict[str, list[str]]:
    """Documents as "train", "val" and "test", shuffled; a document stays in its split when others are added.

    Args:
        documents: Name -> document.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents.
    """
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        splits[_split_of(name, held_out_share)].append(documents[name])
    return splits


def _split_of(name: str, held_out_share: float) -> str:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "val" if place < held_out_share else "test" if place < 2 * held_out_share else "train"


def cut(tokenizer: Any, documents: Iterable[str], length: int, count: int, purpose: str, argument: str) -> Tensor:
    """Documents joined by the end-of-text token, as sequences of one length; only as many are read as are needed.

    Args:
        tokenizer: A transformers tokenizer.
        documents: In their order.
        length: Tokens per sequence.
        count: Sequences; fewer if there is not so much text.
        purpose: What errors say that the text is for.
        argument: What errors call the length.

    Returns:
        int64, (sequences, length).

    Raises:
        ValueError: If there is not one sequence.
    """
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= count * length:
            break
        tokens += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
    found = min(count, len(tokens) // length)
    if not found:
        raise ValueError(
            f"`text` must hold at least {length} tokens {purpose}, got {len(tokens)}. "
            f"Give more documents, or lower `{argument}`."
        )
    return torch.tensor(tokens[: found * length]).view(found, length)


def load_documents(text: str | list[str]) -> dict[str, str]:
    """Name -> document, of "stdlib", files, folders or globs.

    Raises:
        ValueError: If nothing is found.
    """
    if text == "stdlib":
        files = stdlib_sources()
    else:
        files = {str(file): file for entry in ([text] if isinstance(text, str) else text) for file in _files(entry)}
    documents = {name: file.read_text(encoding="utf-8", errors="replace") for name, file in files.items()}
    documents = {name: document for name, document in documents.items() if document.strip()}
    if not documents:
        raise ValueError(
            f"`text` must name files that hold text, got {text!r}, which matches none. "
            "Give files, folders, globs, 'stdlib' or 'hub:NAME'."
        )
    return documents


def _files(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]
