"""The random state of this process, so that a resumed run draws what the unbroken one draws."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


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
        state: The result of `random_state`, of this process or another. Of the states of GPUs as many are set as
            there are GPUs here.
    """
    torch.set_rng_state(state["torch"].cpu())
    for gpu, own in zip(_gpus(), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own.cpu(), gpu)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _gpus() -> list[int]:
    """The GPU of this process first, whatever its number, then all others that it sees."""
    if not torch.cuda.is_available():
        return []
    own = torch.cuda.current_device()
    return [own, *(gpu for gpu in range(torch.cuda.device_count()) if gpu != own)]
