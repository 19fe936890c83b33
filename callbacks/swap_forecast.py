"""A forecast of the swap: measures whether attention gains speed from the schedule's final sparsity."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import fastest, in_words
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.pruner import AttentionPruner
from sparse_prune.swap_timer import SwapTimer

log = logging.getLogger(__name__)

NO_GAIN = "no backend is faster than dense attention"
"""Why a layer reverts to dense attention."""
NO_GAIN_REMEDY = (
    "Use longer sequences, larger blocks or more sparsity; or name a backend, as in KernelSwap('sdpa'), to keep the "
    "patterns without a measurement."
)


def measurement(layer: str, sparsity: float, tokens: int | None, measured_ms: Mapping[str, float]) -> str:
    """Describe a measurement in words.

    Args:
        layer: Name of the measured layer.
        sparsity: Share of possible blocks that the pattern prunes.
        tokens: Length of the call; None if unknown.
        measured_ms: "dense" and backends -> milliseconds.
    """
    length = "" if tokens is None else f" and {tokens} tokens"
    return f"at {sparsity:.0%} sparsity{length}, attention like that of {layer} measures {in_words(measured_ms)}"


@dataclass(frozen=True)
class SwapForecast:
    """Measured times of one attention call, forward and backward, with a random pattern of the final sparsity."""

    layer: str
    """Qualified name of the layer that was measured, the first of its shape."""
    layers: int
    """Number of layers of that shape."""
    tokens: int
    """Length of the call."""
    sparsity: float
    """Share of possible blocks that the pattern prunes."""
    measured_ms: dict[str, float]
    """"dense" and every backend that skips blocks -> milliseconds."""

    @property
    def gains(self) -> bool:
        """Whether a backend is faster than dense attention, or there is nothing to compare."""
        return len(self.measured_ms) < 2 or fastest(self.measured_ms) != "dense"


def forecast_swap(pruner: AttentionPruner, timer: SwapTimer) -> list[SwapForecast]:
    """Measure once per shape of attention call; empty if the schedule is not of sparsity.

    Args:
        pruner: A pruner whose layers have seen a training call.
        timer: It measures them.
    """
    if pruner.sparsity is None or pruner.sparsity.final == 0.0:
        return []
    found = []
    for alike in _by_shape(pruner).values():
        layer = alike[0]
        assert layer.last_shape is not None
        tokens, density = layer.last_shape.kv_len, 1.0 - pruner.sparsity.final
        pattern = random_pattern(layer.num_heads, tokens, pruner.sides, density=density, causal=layer.causal)
        if not pattern.sparsity:
            continue  # sequences so short that nothing can be pruned
        times = timer.times(layer, pattern, repeats=1)
        found.append(SwapForecast(layer.name, len(alike), tokens, pattern.sparsity, times))
    return found


def warn_of_loss(forecasts: list[SwapForecast]) -> None:
    """Log all forecasts, and warn if none promises a gain.

    Args:
        forecasts: The forecasts of all shapes.
    """
    for forecast in forecasts:
        log.info("%s", _line(forecast))
    if forecasts and not any(forecast.gains for forecast in forecasts):
        log.warning(
            "Pruning is not expected to make this run faster, because %s: %s. Layers that gain nothing get their "
            "connections back when they settle, after they have trained without them. %s",
            NO_GAIN,
            _line(forecasts[0]),
            NO_GAIN_REMEDY,
        )


def _line(forecast: SwapForecast) -> str:
    layers = f"{forecast.layer} ({forecast.layers} layers)"
    return measurement(layers, forecast.sparsity, forecast.tokens, forecast.measured_ms)


def _by_shape(pruner: AttentionPruner) -> dict[Hashable, list[PrunableAttention]]:
    """Group layers by everything that their time depends on."""
    found: dict[Hashable, list[PrunableAttention]] = {}
    for state in pruner.layers.values():
        layer, shape = state.layer, state.layer.last_shape
        if shape is not None and shape.q_len == shape.kv_len:
            sizes = tuple(value for name, value in shape._asdict().items() if name != "options")
            key = (layer.num_heads, layer.num_kv_heads, layer.causal, sizes, shape.options.window)
            found.setdefault(key, []).append(layer)
    return found
