"""Random numbers of a resumed run: those that the unbroken one would have drawn, dropout's among them."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl

from sparse_prune.distributed import from_all_ranks, rank
from sparse_prune.random_state import random_state, set_random_state

log = logging.getLogger(__name__)


class Randomness:
    """Keeps every process's random state in a checkpoint, and goes on from it before the first batch is fetched.

    Within an epoch the loaders' iterators, which draw too, were made before the checkpoint: there the state is set once
    more behind theirs.
    """

    def __init__(self) -> None:
        self._within_epoch = False
        self._loaded: dict[str, Any] | None = None
        self._set = False

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Remember whether the epoch goes on."""
        self._within_epoch = not trainer.is_last_batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. Every process must ask for it."""
        return {"within_epoch": self._within_epoch, "ranks": from_all_ranks(random_state())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Remember what a checkpoint holds, until training starts."""
        self._loaded, self._set = state, False

    def begin_fit(self) -> None:
        """Set what was loaded, before loaders are made."""
        if self._loaded is not None:
            self._set_state(self._loaded["ranks"])

    def begin_training(self) -> None:
        """Set what was loaded, once loaders are made, unless they have drawn from it as those of the unbroken run."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and (loaded["within_epoch"] or not self._set):
            self._within_epoch = loaded["within_epoch"]
            self._set_state(loaded["ranks"])

    def _set_state(self, ranks: list[dict[str, Any]]) -> None:
        here, count = rank()
        if count == len(ranks):
            set_random_state(ranks[here])
            self._set = True
        elif self._loaded is None:  # the last time
            log.warning(
                "The checkpoint holds the random state of %d processes, this run has %d: it draws other numbers, for "
                "dropout say, than the unbroken run would have. Resume on %d processes to repeat that one.",
                len(ranks),
                count,
                len(ranks),
            )
