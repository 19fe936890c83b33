"""The swap of settled layers to block-sparse attention, if that is faster."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import fastest, in_words
from sparse_prune.callbacks.collaborator import Collaborator
from sparse_prune.callbacks.swap_forecast import NO_GAIN, forecast_swap, measurement, warn_of_loss
from sparse_prune.kernels import BACKENDS, check_trains
from sparse_prune.pruner import AttentionPruner
from sparse_prune.swap_timer import SwapTimer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwapEvent:
    """The swap of a settled layer."""

    step: int
    """Optimizer step of the swap."""
    layer: str
    """Qualified name of the layer."""
    backend: str
    """The layer's backend after the swap; "dense" if no other was faster and the layer was reverted."""
    sparsity: float
    """Share of the layer's possible blocks that was pruned when it settled."""
    dense_ms: float | None = None
    """Milliseconds of a forward and backward pass with dense SDPA. None if not measured."""
    sparse_ms: float | None = None
    """The same with the fastest sparse backend."""
    measured_ms: dict[str, float] = field(default_factory=dict)
    """The same with every backend that was measured."""
    tokens: int | None = None
    """Length of the call that was measured. None if none was."""


class KernelSwap(Collaborator):
    """Swaps settled layers to a block-sparse backend, called by `AttentionPruning` after its decisions.

    Args:
        backend: "auto" measures dense attention against every backend that skips blocks, in turns, on the layer's own
            shapes, forward and backward, and reverts a layer that gains nothing to dense attention. In the first
            training step it measures the final sparsity in advance, and warns if no layer would gain. The name of a
            backend takes that one unmeasured.
        tuning_seconds: What measuring launch configurations of the Triton kernels may take in a run on a GPU,
            compiling included; 0: none are measured. The fastest are kept on disk (`SPARSE_PRUNE_CACHE_DIR`) by device
            and kind of call, and the next run goes on with those that are left.

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
        """Measure the final sparsity once, before anything is pruned, and warn if no layer would gain.

        Args:
            trainer: The Trainer.
            pl_module: The module that it trains.
            pruner: A pruner with a block size, whose layers have seen a training call.
        """
        if not self._forecast_due:
            return
        self._forecast_due = False
        if trainer.is_global_zero:
            warn_of_loss(forecast_swap(pruner, self.timer))

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: AttentionPruner) -> None:
        """Swap the layers that have settled.

        Args:
            trainer: The Trainer.
            pl_module: The module that it trains.
            pruner: The pruner, after its decision if one was due.
        """
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
            _tell(event)

    def _event(self, layer: PrunableAttention, step: int) -> SwapEvent:
        assert layer.pattern is not None
        sparsity = layer.pattern.sparsity
        if self.backend != "auto" or layer.last_shape is None:
            return SwapEvent(step, layer.name, "gather" if self.backend == "auto" else self.backend, sparsity)
        tokens = layer.last_shape.kv_len
        times = self.timer.times(layer)
        sparse = min((ms for name, ms in times.items() if name != "dense"), default=None)
        return SwapEvent(step, layer.name, fastest(times), sparsity, times.get("dense"), sparse, times, tokens)

    @override
    def state(self) -> dict[str, Any]:
        return {"events": [asdict(event) for event in self.events], "forecast_due": self._forecast_due}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        self.events = [SwapEvent(**event) for event in state["events"]]
        self._forecast_due = state.get("forecast_due", False)  # older state has none


def _tell(event: SwapEvent) -> None:
    if event.backend != "dense":
        times = in_words(event.measured_ms) or "not measured"
        log.info("Step %d: %s -> %s (%s)", event.step, event.layer, event.backend, times)
    else:
        found = measurement(event.layer, event.sparsity, event.tokens, event.measured_ms)
        log.info("Step %d: %s reverts to dense attention, because %s: %s", event.step, event.layer, NO_GAIN, found)
