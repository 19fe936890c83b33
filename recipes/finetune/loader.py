"""A loader that a checkpoint in the middle of an epoch can continue."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
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
