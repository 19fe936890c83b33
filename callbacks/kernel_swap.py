"""The swap: settled layers skip their pruned blocks, if that is faster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import fastest, in_words, time_attention
from sparse_prune.callbacks.collaborator import Collaborator
from sparse_prune.callbacks.swap_forecast import NO_GAIN, forecast_swap, measurement, warn_of_loss
from sparse_prune.clock import hides_host, now
from sparse_prune.kernels import BACKENDS, check_trains, skipping_backends
from sparse_prune.pruner import AttentionPruner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwapEvent:
    """What became of a settled layer."""

    step: int
    """Optimizer step of the swap."""
    layer: str
    """Qualified name of the layer."""
    backend: str
    """The backend taken; "dense" if it was no faster and the layer got all its connections back."""
    sparsity: float
    """Share of the layer's possible blocks that was pruned when it settled."""
    dense_ms: float | None = None
    """Forward and backward pass of dense SDPA. None if not measured."""
    sparse_ms: float | None = None
    """The same with the sparse backend."""
    measured_ms: dict[str, float] = field(default_factory=dict)
    """The same with every backend that was measured."""
    tokens: int | None = None
    """Length of the call that was measured. None if none was."""


class KernelSwap(Collaborator):
    """Swaps settled layers to a block-sparse backend, when `AttentionPruning` asks it to after its decisions.

    Args:
        backend: "auto" measures dense attention against every backend that skips blocks, in turns, on the layer's own
            shapes, forward and backward, and gives a layer that gains nothing its connections back. In the first
            training step it measures the final sparsity in advance, and warns if nothing is to be gained. A backend's
            name takes that one unmeasured.
        tune: On a GPU, measure the launch configurations of the Triton kernels on the first layer of a shape. They are
            kept on disk (`SPARSE_PRUNE_CACHE_DIR`), so that a device does it once.

    Raises:
        ValueError: If there is no such backend; when training starts, if it cannot train on the module's device.
    """

    def __init__(self, backend: str = "auto", tune: bool = True) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"`backend` must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}.")
        self.backend = backend
        self.tune = tune
        self.events: list[SwapEvent] = []
        """All swaps so far, in order."""
        self.measuring_seconds = 0.0
        """What measurements took in this process, all in all: they fall into training steps and are no part of them."""
        self._forecast_due = backend == "auto"
        self._hidden = True  # whether the device hides what its host takes; so we assume before the first step

    @override
    def forget_run(self) -> None:
        """A new run begins: the swaps so far are those of another."""
        self.events = []
        self._forecast_due = self.backend == "auto"

    def begin_training(self, pl_module: pl.LightningModule) -> None:
        """Refuse a backend that cannot train where the module is."""
        if self.backend != "auto":
            check_trains(self.backend, pl_module.device)

    def forecast(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: AttentionPruner) -> None:
        """Measure the final sparsity once, before anything is pruned, and warn if nothing is to be gained.

        Args:
            trainer: The Trainer.
            pl_module: What it trains.
            pruner: Its layers have seen a training call, and its block size is known.
        """
        if not self._forecast_due:
            return
        self._forecast_due = False
        if trainer.is_global_zero:
            with self._measuring(pl_module.device):
                forecasts = forecast_swap(pruner, self.tune)
            warn_of_loss(forecasts)

    def after_backward(self, device: torch.device) -> None:
        """Look whether the host is ahead of its device, which decides what time counts: see `clock.milliseconds`.

        Args:
            device: The module's, which nothing has waited for since the backward pass.
        """
        self._hidden = hides_host(device)

    def end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pruner: AttentionPruner) -> None:
        """Swap what has settled.

        Args:
            trainer: The Trainer.
            pl_module: What it trains.
            pruner: It has decided, if a decision was due.
        """
        waiting = [
            name
            for name, state in pruner.layers.items()
            if state.settled_at is not None and state.layer.mode != "sparse" and not state.restored
        ]
        if not waiting:
            return
        # Clocks differ between ranks, decisions must not: the first rank measures for all.
        events: list[SwapEvent] = []
        if trainer.is_global_zero:
            with self._measuring(pl_module.device):
                events = [self._event(pruner.layers[name].layer, trainer.global_step) for name in waiting]
        for event in trainer.strategy.broadcast(events, src=0):
            pruner.swap(event.layer, event.backend)
            self.events.append(event)
            _tell(event)

    @contextmanager
    def _measuring(self, device: torch.device) -> Iterator[None]:
        """Adds up seconds; what a GPU has still to do of the training step comes before them."""
        start = now(device)
        yield
        self.measuring_seconds += now(device) - start

    def _event(self, layer: PrunableAttention, step: int) -> SwapEvent:
        assert layer.pattern is not None
        sparsity = layer.pattern.sparsity
        if self.backend != "auto" or layer.last_shape is None:
            return SwapEvent(step, layer.name, "gather" if self.backend == "auto" else self.backend, sparsity)
        tokens = layer.last_shape.kv_len
        backends = skipping_backends(layer.last_shape.device)
        times = time_attention(layer, backends, tuned=self.tune, hidden=self._hidden)
        sparse = min((ms for name, ms in times.items() if name != "dense"), default=None)
        return SwapEvent(step, layer.name, fastest(times), sparsity, times.get("dense"), sparse, times, tokens)

    @override
    def state(self) -> dict[str, Any]:
        return {"events": [asdict(event) for event in self.events], "forecast_due": self._forecast_due}

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        self.events = [SwapEvent(**event) for event in state["events"]]
        self._forecast_due = state.get("forecast_due", False)  # state of before there were forecasts has none


def _tell(event: SwapEvent) -> None:
    if event.backend != "dense":
        times = in_words(event.measured_ms) or "not measured"
        log.info("Step %d: %s -> %s (%s)", event.step, event.layer, event.backend, times)
    else:
        found = measurement(event.layer, event.sparsity, event.tokens, event.measured_ms)
        log.info("Step %d: %s gets its connections back, for %s: %s", event.step, event.layer, NO_GAIN, found)
