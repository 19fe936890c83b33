"""Data loaders that resume in the middle of an epoch, with the same order on any number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.held_out import HeldOutLoader

SPLITS = ("train", "val", "test")
_Loader = TypeVar("_Loader", bound=DataLoader[Any])


class ResumableDataLoader(DataLoader[Tensor]):
    """A DataLoader without shuffling that resumes in the middle of an epoch.

    Batches that were served before the checkpoint are not made again. Those that workers prefetched were not served.
    """

    _served = 0
    _skip = 0

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._served, self._skip = self._skip, 0
        batches = iter(self._rest(self._served)) if self._served else super().__iter__()
        for batch in batches:
            self._served += 1
            yield batch
        self._served = 0

    def _rest(self, served: int) -> DataLoader[Tensor]:
        """Make a loader of the rest of an epoch, after some batches."""
        assert self.batch_sampler is not None
        return DataLoader(
            self.dataset,
            batch_sampler=list(islice(self.batch_sampler, served, None)),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            multiprocessing_context=self.multiprocessing_context,
            # The seed of the workers is not drawn from torch's generator, as that was done before the checkpoint.
            generator=torch.Generator().manual_seed(served),
        )

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches served in this epoch."""
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were served."""
        self._skip = state["served"]


class SplitDataModule(pl.LightningDataModule, ABC):
    """Data in the splits "train", "val" and "test", loaded in order, the last two as `HeldOutBatch`.

    Processes take turns in the examples, so that n of them together take what one would take; Lightning's own sampler
    would shuffle them.

    Args:
        batch_size: Examples per batch and process.
        num_workers: Worker processes per loader and process; 0: the training process makes the examples.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        check_range("[1, inf)", batch_size=batch_size)
        check_range("[0, inf)", "0 starts no processes.", num_workers=num_workers)
        self.batch_size, self.num_workers = batch_size, num_workers

    @abstractmethod
    def examples_of(self, split: str) -> Any:
        """Return the examples of a split, after `setup`."""

    def _loader(self, kind: type[_Loader], split: str) -> _Loader:
        examples = self.examples_of(split)
        shares = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        sampler: DistributedSampler[Any] | None = None
        if shares is not None:
            sampler = DistributedSampler(examples, shuffle=False, **shares)
        return kind(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        return self._loader(ResumableDataLoader, "train")

    @override
    def val_dataloader(self) -> HeldOutLoader:
        return self._loader(HeldOutLoader, "val")

    @override
    def test_dataloader(self) -> HeldOutLoader:
        return self._loader(HeldOutLoader, "test")
