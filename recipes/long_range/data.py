"""The data module of ListOps, as padded tokens."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path

import torch
from typing_extensions import override

from sparse_prune.recipes.base.classification import ClassificationDataModule, Example
from sparse_prune.recipes.base.loader import SPLITS
from sparse_prune.recipes.long_range.listops import DIGITS, END, OPERATORS, Rules, generate

PAD, CLS = 0, 1
VOCABULARY = {token: index for index, token in enumerate(("<pad>", "<cls>", *OPERATORS, END, *DIGITS))}


class ListOpsDataModule(ClassificationDataModule):
    """Expressions, generated or read; the class is the value. A <cls> token comes first, padding last.

    The benchmark's files write every list as nested pairs in parentheses. These are redundant and dropped; lengths
    count without them, as in the benchmark's generator.

    Args:
        data: "generate", or a folder with the benchmark's basic_train.tsv, basic_val.tsv and basic_test.tsv.
        rules: Bounds of generated expressions; examples are padded and cut to their `max_length`.
        batch_size: Expressions per batch.
        train_examples: Expressions to train on; the benchmark has 96000.
        val_examples: Expressions of validation; the benchmark has 2000.
        test_examples: Expressions of the test; the benchmark has 2000.
        seed: Seed of the expressions and of their order.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a number is out of range or a file holds other tokens.
    """

    classes = list(DIGITS)

    def __init__(
        self,
        data: str = "generate",
        rules: Rules = Rules(),  # noqa: B008
        batch_size: int = 32,
        train_examples: int = 96_000,
        val_examples: int = 2000,
        test_examples: int = 2000,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, {"train": train_examples, "val": val_examples, "test": test_examples}, seed)
        self.data, self.rules = data, rules

    @property
    def length(self) -> int:
        """Tokens of an example, <cls> included."""
        return self.rules.max_length

    @cached_property
    def _generated(self) -> list[tuple[tuple[str, ...], int]]:
        """Expressions of all splits at once, so that none is in two of them."""
        return generate(sum(self.counts.values()), self.rules, self.seed)

    @override
    def make(self, split: str, count: int) -> list[Example]:
        if self.data != "generate":
            return [self._example(tokens, value) for tokens, value in _read(Path(self.data), split, count)]
        start = sum(self.counts[other] for other in SPLITS[: SPLITS.index(split)])
        return [self._example(tokens, value) for tokens, value in self._generated[start : start + count]]

    def _example(self, tokens: tuple[str, ...], value: int) -> Example:
        ids = torch.full((self.length,), PAD)
        known = [CLS, *(VOCABULARY[token] for token in tokens)][: self.length]
        ids[: len(known)] = torch.tensor(known)
        return {"input_ids": ids, "labels": torch.tensor(value)}


def _read(folder: Path, split: str, count: int) -> list[tuple[tuple[str, ...], int]]:
    path = folder.expanduser() / f"basic_{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"`data` must be 'generate' or a folder with {path.name}, got {str(folder)!r}. Check the path."
        )
    found = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t"), start=2):
            tokens = tuple(token for token in (row.get("Source") or "").split() if token not in "()")
            unknown = [token for token in tokens if token not in VOCABULARY]
            if unknown or not tokens or not (row.get("Target") or "").isdigit():
                raise ValueError(f"{path} must hold ListOps in Source, a digit in Target, got line {number}: {row}.")
            found.append((tokens, int(row["Target"])))
            if len(found) == count:
                break
    return found
