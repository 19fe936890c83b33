"""The base of classification recipes: module and data."""

from __future__ import annotations

import hashlib
import logging
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.held_out import HeldOutBatch
from sparse_prune.recipes.base.loader import SPLITS, SplitDataModule
from sparse_prune.recipes.base.module import FineTuneModule
from sparse_prune.words import some

log = logging.getLogger(__name__)
_NAMED = 8  # rare classes that a warning names
Example = dict[str, Tensor]
"""Inputs by name, and `labels`, int64, ()."""


class Examples(Protocol):
    """A sequence of examples, made beforehand or on request."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class ClassificationModule(FineTuneModule):
    """Trains a classifier by cross-entropy; logs loss (nats per example) and accuracy of validation and test.

    Args:
        model: The model to train.
        num_classes: Number of classes.
        **training: As for `FineTuneModule`.
    """

    def __init__(self, model: Any, num_classes: int, **training: Any) -> None:
        super().__init__(model, **training)
        check_range("[2, inf)", "Give examples of more classes.", num_classes=num_classes)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the logits of a batch without labels, (batch, num_classes)."""
        return torch.as_tensor(self.model(**batch).logits)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss, _, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        self._watch(batch, "val", self.val_accuracy)

    @override
    def test_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        self._watch(batch, "test", self.test_accuracy)

    def _watch(self, batch: HeldOutBatch, split: Literal["val", "test"], accuracy: MulticlassAccuracy) -> None:
        loss, logits, labels = self._loss(batch.examples)
        self.log_held_out(split, loss, batch.counted)
        if batch.counted:
            accuracy.update(logits, labels)
        self.log(f"{split}/accuracy", accuracy, prog_bar=True, batch_size=1)

    def _loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        labels = batch["labels"]
        logits = self.logits({name: value for name, value in batch.items() if name != "labels"})
        return F.cross_entropy(logits.float(), labels), logits, labels


class ClassificationDataModule(SplitDataModule):
    """Examples in three splits; the seed determines the order of the training examples, the same in every epoch.

    Args:
        batch_size: Examples per batch.
        counts: Split -> most examples.
        seed: Seed of the order.
        num_workers: As for `SplitDataModule`.

    Raises:
        ValueError: If a count is not positive.
    """

    def __init__(self, batch_size: int, counts: Mapping[str, int], seed: int, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        check_range("[1, inf)", **{f"{split}_examples": counts[split] for split in SPLITS})
        self.counts, self.seed = dict(counts), seed
        self.examples: dict[str, Examples] = {}
        """Split -> examples."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes in the order of their numbers, known before `setup`."""

    @abstractmethod
    def make(self, split: str, count: int) -> Examples:
        """Make up to `count` examples of a split, in order."""

    @override
    def setup(self, stage: str) -> None:
        if self.examples:
            return
        for split in SPLITS:
            self.examples[split] = self.make(split, self.counts[split])
            if not len(self.examples[split]):
                raise ValueError(
                    f"`data` must hold a class with an example for every split, {len(SPLITS)} or more, got "
                    f"{len(self.classes)} classes and none for {split}. Give more data, or name another column of "
                    "labels if these are no classes."
                )
        self.examples["train"] = _shuffled(self.examples["train"], self.seed)

    @override
    def examples_of(self, split: str) -> Examples:
        return self.examples[split]


def _shuffled(examples: Examples, seed: int) -> Examples:
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return Subset(cast(Dataset[Example], examples), order)


def class_settings(classes: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """Return the settings of a transformers configuration for classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}


def split_by_name(names: Sequence[str], held_out_share: float) -> dict[str, list[str]]:
    """Split names by the order of their hashes: validation and test get `held_out_share` each, at least one name.

    If there are fewer than three, training gets all of them.

    Raises:
        ValueError: If the share is out of range.
    """
    check_range("(0, 0.5)", held_out_share=held_out_share)
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = max(1, round(held_out_share * len(ordered))) if len(ordered) >= len(SPLITS) else 0
    return {"val": ordered[:held], "test": ordered[held : 2 * held], "train": ordered[2 * held :]}


def warn_of_rare_classes(counts: Mapping[str, int]) -> None:
    """Warn of classes that validation and test lack."""
    rare = {label: count for label, count in counts.items() if count < len(SPLITS)}
    if rare:
        log.warning(
            "Classes with fewer than %d examples are not in validation and test; those with none cannot be learned: %s",
            len(SPLITS),
            some([f"{label} ({count})" for label, count in rare.items()], _NAMED),
        )
