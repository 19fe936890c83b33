"""Measures what a layer would gain from a swap to block-sparse attention."""

from __future__ import annotations

import torch

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import fastest, time_attention, tune
from sparse_prune.clock import hides_host, now
from sparse_prune.kernels import skipping_backends
from sparse_prune.pattern import BlockPattern
from sparse_prune.ranges import check_range
from sparse_prune.swap_event import SwapEvent


class SwapTimer:
    """Times layers with dense attention and with every backend that skips blocks on their device.

    Args:
        tuning_seconds: Most seconds to spend on finding the backends' launch configurations, over all layers; 0: none
            are tried.

    Raises:
        ValueError: If `tuning_seconds` is negative.
    """

    def __init__(self, tuning_seconds: float = 10.0) -> None:
        check_range("[0, inf)", "0 takes launch configurations as they are.", tuning_seconds=tuning_seconds)
        self.tuning_seconds = tuning_seconds
        """Seconds that are left for finding launch configurations."""
        self.seconds = 0.0
        """Total time of measurements in this process, in seconds."""
        self._hidden = True  # whether the host runs ahead of its device; assumed before the first step

    def after_backward(self, device: torch.device) -> None:
        """Note whether the host runs ahead of its device, which decides what `clock.milliseconds` measures."""
        self._hidden = hides_host(device)

    def times(
        self, layer: PrunableAttention, pattern: BlockPattern | None = None, repeats: int = 3
    ) -> dict[str, float]:
        """Measure one layer; arguments and result as those of `time_attention`."""
        assert layer.last_shape is not None
        device = layer.last_shape.device
        start = now(device)  # a GPU may still have work of the step to finish
        backends = skipping_backends(device)
        if self.tuning_seconds > 0.0:
            backends = tuple(tune(layer, backends, self.tuning_seconds, pattern))
            self.tuning_seconds = max(0.0, self.tuning_seconds - (now(device) - start))
        found = time_attention(layer, backends, repeats, pattern, self._hidden)
        self.seconds += now(device) - start
        return found

    def event(self, layer: PrunableAttention, step: int) -> SwapEvent:
        """Measure a settled layer, and choose its fastest backend, or dense attention if no other is faster."""
        assert layer.pattern is not None
        assert layer.last_shape is not None
        times = self.times(layer)
        sparse = min((ms for name, ms in times.items() if name != "dense"), default=None)
        sizes = (layer.pattern.sparsity, times.get("dense"), sparse, times, layer.last_shape.kv_len)
        return SwapEvent(step, layer.name, fastest(times), *sizes)
