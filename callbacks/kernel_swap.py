"""The swap of settled layers to block-sparse attention, if that is faster."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.callbacks.collaborator import Collaborator
from sparse_prune.callbacks.swap_forecast import forecast_swap, warn_of_loss
from sparse_prune.kernels import BACKENDS, check_trains
from sparse_prune.pruner import AttentionPruner
from sparse_prune.swap_event import SwapEvent, tell
from sparse_prune.swap_timer import SwapTimer


class KernelSwap(Collaborator):
    """Swaps settled layers to a block-sparse backend, called by `AttentionPruning` after its decisions.

    Args:
        backend: "auto" measures dense attention against every backend that skips blocks, in turns, on the layer's own
            shapes, forward and backward, and reverts a layer that gains nothing to dense attention. In the first
            training step it measures the final sparsity in advance, and warns if no layer would gain. The name of a
            backend takes that one unmeasured.
        tuning_seconds: Most seconds that a run on a GPU spends on measuring launch configurations of the Triton
            kernels, compilation included; 0: none are measured. The fastest are kept on disk
            (`SPARSE_PRUNE_CACHE_DIR`) by device and kind of call, and the next run continues with those that are left.

    Raises:
        ValueError: If there is no such backend, or `tuning_seconds` is negative; when training starts, if the backend
            cannot train on the module's device.
    """

    def __init__(self, backend: str = "auto", tuning_seconds: float = 10.0) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"`backend` must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
        self.backend = backend
        self.events: list[SwapEvent] = []
        """All swaps so far, in order."""
        self.timer = SwapTimer(tuning_seconds)
        """Measures layers; step times leave its seconds out."""
        self._forecast_due = backend == "auto"

    @override
    def forget_run(self) -> None:
        """Drop the swaps of an earlier run."""
        self.events = []
        self._forecast_due = self.backend == "auto"

    def begin_training(self, pl_module: pl.LightningModule) -> None:
        """Refuse a backend that cannot train on the module's device."""
        if self.backend != "auto":
            check_trains(self.backend, pl_module.device)

    def forecast(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: AttentionPruner) -> None:
        """Measure the final sparsity once, before anything is pruned, and warn if no layer would gain."""
        if not self._forecast_due:
            return
        self._forecast_due = False
        if trainer.is_global_zero:
            warn_of_loss(forecast_swap(pruner, self.timer))

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: AttentionPruner) -> None:
        """Swap the layers that have settled."""
        waiting = [
            name
            for name, state in pruner.layers.items()
            if state.settled_at is not None and state.layer.mode != "sparse" and not state.reverted
        ]
        if not waiting:
            return
        # Clocks differ between ranks but decisions must not: rank 0 measures for all.
        events: list[SwapEvent] = []
        if trainer.is_global_zero:
            events = [self._event(pruner.layers[name].layer, trainer.global_step) for name in waiting]
        for event in trainer.strategy.broadcast(events, src=0):
            pruner.swap(event.layer, event.backend)
            self.events.append(event)
            tell(event)

    def _event(self, layer: PrunableAttention, step: int) -> SwapEvent:
        if self.backend == "auto" and layer.last_shape is not None:
            return self.timer.event(layer, step)
        assert layer.pattern is not None
        backend = "gather" if self.backend == "auto" else self.backend
        return SwapEvent(step, layer.name, backend, layer.pattern.sparsity)

    @override
    def state(self) -> dict[str, Any]:
        return {"events": [asdict(event) for event in self.events], "forecast_due": self._forecast_due}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        self.events = [SwapEvent(**event) for event in state["events"]]
        self._forecast_due = state.get("forecast_due", False)  # older state has none
