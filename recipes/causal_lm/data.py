"""Text as sequences of one length, with held-out documents."""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sparse_prune.recipes.finetune.loader import SplitDataModule
from sparse_prune.recipes.finetune.pretrained import load_tokenizer
from sparse_prune.recipes.finetune.sources import hub_rows, stdlib_sources
from torch import Tensor
from typing_extensions import override

_HUB = "hub:"


class TextDataModule(SplitDataModule):
    """Documents, split by name into training, validation and test, joined by the end-of-text token and cut.

    Whole documents are held out, so no sequence of one split continues a document of another.

    Args:
        tokenizer: A model, as `load_tokenizer` takes it.
        text: "stdlib" (the sources of the Python standard library), files, folders or globs, or
            `hub:NAME[:CONFIG[:COLUMN]]` for the training split of a hub data set.
        context_length: Tokens per sequence.
        batch_size: Sequences per batch.
        train_sequences: Sequences to train on per epoch.
        val_sequences: Sequences of the validation documents.
        test_sequences: Sequences of the test documents.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents.

    Raises:
        ValueError: If a count is not positive, nothing is found, or the text is too short.
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
    ) -> None:
        super().__init__(batch_size)
        counts = {"context_length": context_length, "train_sequences": train_sequences}
        for name, value in (counts | {"val_sequences": val_sequences, "test_sequences": test_sequences}).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0.0 < held_out_share < 0.5:
            raise ValueError(f"`held_out_share` must lie in (0, 0.5), got {held_out_share}.")
        self.tokenizer_name, self.text = tokenizer, text
        self.context_length = context_length
        self.wanted = {"train": train_sequences, "val": val_sequences, "test": test_sequences}
        self.held_out_share, self.seed = held_out_share, seed
        self.sequences: dict[str, Tensor] = {}
        """Split -> int64, (sequences, context_length)."""

    @override
    def setup(self, stage: str) -> None:
        if self.sequences:
            return
        tokenizer = load_tokenizer(self.tokenizer_name)
        documents = load_documents(self.text)
        names = sorted(documents)
        random.Random(self.seed).shuffle(names)
        for split, count in self.wanted.items():
            mine = [name for name in names if self._split(name) == split]
            self.sequences[split] = self._cut(tokenizer, (documents[name] for name in mine), count, split)

    def _split(self, name: str) -> str:
        """By a hash of the document's name: stable when documents are added."""
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        if place < self.held_out_share:
            return "val"
        return "test" if place < 2 * self.held_out_share else "train"

    def _cut(self, tokenizer: Any, documents: Iterator[str], count: int, split: str) -> Tensor:
        """Tokenise only as many documents as are needed."""
        tokens: list[int] = []
        for document in documents:
            if len(tokens) >= count * self.context_length:
                break
            tokens += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
        found = min(count, len(tokens) // self.context_length)
        if not found:
            raise ValueError(
                f"`text` must hold at least {self.context_length} tokens for the {split} split, got {len(tokens)}. "
                "Give more documents, or lower `context_length`."
            )
        return torch.tensor(tokens[: found * self.context_length]).view(found, self.context_length)

    @override
    def examples_of(self, split: str) -> Tensor:
        return self.sequences[split]


def load_documents(text: str | list[str]) -> dict[str, str]:
    """Name -> document; see `TextDataModule` for what `text` may be.

    Raises:
        ValueError: If nothing is found.
    """
    if isinstance(text, str) and text.startswith(_HUB):
        rows, (column,) = hub_rows(text.removeprefix(_HUB), ["text"], "text")
        return {str(index): row for index, row in enumerate(rows[column]) if row.strip()}
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
