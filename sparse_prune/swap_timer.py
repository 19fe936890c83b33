"""Measures what a layer would gain from a swap to block-sparse attention."""

from __future__ import annotations

import torch

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import time_attention
from sparse_prune.clock import hides_host, now
from sparse_prune.kernels import skipping_backends
from sparse_prune.pattern import BlockPattern


class SwapTimer:
    """Times layers with dense attention and with every backend that skips blocks on their device.

    Args:
        tuned: Whether to find the backends' launch configurations first.
    """

    def __init__(self, tuned: bool = True) -> None:
        self.tuned = tuned
        self.seconds = 0.0
        """Total time of measurements in this process, in seconds."""
        self._hidden = True  # whether the host runs ahead of its device; assumed before the first step

    def after_backward(self, device: torch.device) -> None:
        """Note whether the host runs ahead of its device, which decides what `clock.milliseconds` measures.

        Args:
            device: A device for which nothing has waited since the backward pass.
        """
        self._hidden = hides_host(device)

    def times(
        self, layer: PrunableAttention, pattern: BlockPattern | None = None, repeats: int = 3
    ) -> dict[str, float]:
        """Measure one layer; arguments and result as those of `time_attention`."""
        assert layer.last_shape is not None
        device = layer.last_shape.device
        start = now(device)  # a GPU may still have work of the step to finish
        found = time_attention(layer, skipping_backends(device), repeats, self.tuned, pattern, self._hidden)
        self.seconds += now(device) - start
        return found
