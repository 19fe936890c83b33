"""The random state in checkpoints, so that a resumed run draws what the unbroken one would have drawn."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl

from sparse_prune.distributed import from_all_ranks, rank
from sparse_prune.random_state import random_state, set_random_state

log = logging.getLogger(__name__)


class Randomness:
    """Saves every process's random state in a checkpoint, and restores it before the first batch is fetched.

    In the middle of an epoch the state is restored once more after the loaders' iterators, which draw too: the unbroken
    run made them before the checkpoint.
    """

    def __init__(self) -> None:
        self._within_epoch = False
        self._loaded: dict[str, Any] | None = None
        self._set = False

    def end_batch(self, trainer: pl.Trainer) -> None:
        """Record whether the epoch goes on."""
        self._within_epoch = not trainer.is_last_batch

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Every process must call it."""
        return {"within_epoch": self._within_epoch, "ranks": from_all_ranks(random_state())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._loaded, self._set = state, False

    def begin_fit(self) -> None:
        """Set the loaded state before loaders are made."""
        if self._loaded is not None:
            self._set_state(self._loaded["ranks"])

    def begin_training(self) -> None:
        """Set the loaded state again after loaders were made, unless the unbroken run's loaders drew from it too."""
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
                "The checkpoint holds the random state of %d processes, but this run has %d: it draws other numbers, "
                "for dropout say, than the unbroken run. Resume on %d processes to repeat that one.",
                len(ranks),
                count,
                len(ranks),
            )
