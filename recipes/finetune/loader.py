"""A loader that a checkpoint in the middle of an epoch can continue, in the same order on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override


class ResumableDataLoader(DataLoader[Tensor]):
    """A DataLoader that a checkpoint in the middle of an epoch can continue, without shuffling."""

    _served = 0
    _skip = 0

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._served, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self._served, None):
            self._served += 1
            yield batch
        self._served = 0

    def state_dict(self) -> dict[str, int]:
        """Batches served in this epoch."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip what was served."""
        self._skip = state["served"]


def loader_of(data: pl.LightningDataModule, examples: Any, batch_size: int) -> ResumableDataLoader:
    """Examples in their order. Processes share them in turns, so that n of them take together what one would take.

    Left alone, Lightning would shuffle what it hands to several processes.

    Args:
        data: Tells by its trainer how many processes there are.
        examples: What is loaded.
        batch_size: Examples per batch and process.
    """
    shares = data.trainer.distributed_sampler_kwargs if data.trainer is not None else None
    sampler = DistributedSampler(examples, shuffle=False, **shares) if shares is not None else None
    return ResumableDataLoader(examples, batch_size=batch_size, sampler=sampler)
