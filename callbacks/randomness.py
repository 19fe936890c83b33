"""The random state in checkpoints, so that a resumed run draws what the unbroken one would have drawn."""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch

from sparse_prune.distributed import from_all_ranks, rank

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


def random_state() -> dict[str, Any]:
    """Return the states of torch's (CPU, every GPU), NumPy's and Python's generators, in plain types and tensors."""
    name, keys, *rest = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus()],
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the state of the generators.

    Args:
        state: The result of `random_state`, of this process or another. States of more
            GPUs than this machine has are ignored.
    """
    torch.set_rng_state(state["torch"].cpu())
    for gpu, own in zip(_gpus(), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own.cpu(), gpu)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _gpus() -> list[int]:
    """List the GPU of this process first, whatever its number, then all others that it sees."""
    if not torch.cuda.is_available():
        return []
    own = torch.cuda.current_device()
    return [own, *(gpu for gpu in range(torch.cuda.device_count()) if gpu != own)]
