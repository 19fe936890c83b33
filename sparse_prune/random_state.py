"""The random state of this process, so that a resumed run draws what the unbroken one draws."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of torch's (CPU, current GPU), NumPy's and Python's generators, in plain types and tensors."""
    name, keys, *rest = cast(tuple[str, Any, int, int, float], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the state of the generators.

    Args:
        state: The result of `random_state`, of this process or another. A GPU's part needs a GPU, else it is ignored.
    """
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
