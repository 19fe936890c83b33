"""The swap of a layer as an event, and in words."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparse_prune.attention.measure import in_words

log = logging.getLogger(__name__)

NO_GAIN = "no backend is faster than dense attention"
"""Why a layer reverts to dense attention."""
NO_GAIN_REMEDY = (
    "Use longer sequences, larger blocks or more sparsity; or name a backend, as in KernelSwap('sdpa'), to keep the "
    "patterns without a measurement."
)


def measurement(layer: str, sparsity: float, tokens: int | None, measured_ms: Mapping[str, float]) -> str:
    """Describe a measurement in words."""
    length = "" if tokens is None else f" and {tokens} tokens"
    return f"at {sparsity:.0%} sparsity{length}, attention like that of {layer} measures {in_words(measured_ms)}"


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


def tell(event: SwapEvent) -> None:
    """Log a swap."""
    if event.backend != "dense":
        times = in_words(event.measured_ms) or "not measured"
        log.info("Step %d: %s -> %s (%s)", event.step, event.layer, event.backend, times)
    else:
        found = measurement(event.layer, event.sparsity, event.tokens, event.measured_ms)
        log.info("Step %d: %s reverts to dense attention, because %s: %s", event.step, event.layer, NO_GAIN, found)
