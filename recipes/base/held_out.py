"""Held-out examples on any number of processes, each counted once."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric
from typing_extensions import override


class HeldOutBatch(NamedTuple):
    """A batch of a validation or test step."""

    examples: Any
    """Tensors, (examples, ...), alone or by name."""
    counted: int
    """Number of examples that count: all of them, or 0 if the batch only keeps the processes in step."""


class HeldOutLoader(DataLoader[Any]):
    """Leaves out the examples that `DistributedSampler` repeats to give all processes equally many.

    All processes get equally many batches, because a forward pass under FSDP2 needs all of them: a process without
    examples left gets a repeated one that does not count.
    """

    @override
    def __iter__(self) -> Iterator[HeldOutBatch]:  # type: ignore[override]
        assert self.batch_size is not None
        left = self._own_examples()
        for examples in super().__iter__():
            counted = min(left, self.batch_size)
            left -= counted
            shown = max(counted, 1)
            yield HeldOutBatch(apply_to_collection(examples, Tensor, lambda values, end=shown: values[:end]), counted)

    def _own_examples(self) -> int:
        """Number of examples of this process, without repeated ones."""
        examples, sampler = len(cast(Sized, self.dataset)), self.sampler
        if isinstance(sampler, DistributedSampler):
            return len(range(sampler.rank, examples, sampler.num_replicas))
        return examples


class HeldOutMean(Metric):
    """Mean over the examples of all batches and processes.

    `self.log(..., sync_dist=True)` divides by the processes' mean number of examples, rounded down; torchmetrics'
    `MeanMetric` drops NaN, or ignores the weights.
    """

    total: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("examples", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, mean: Tensor, counted: int) -> None:
        """Add a batch: the mean over its examples, (), and the number of them that count."""
        self.total += mean * counted
        self.examples += counted

    @override
    def compute(self) -> Tensor:
        """Return the mean over all batches, ()."""
        return self.total / self.examples
