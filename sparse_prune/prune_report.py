"""The report of one decision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PruneReport:
    """The result of one decision. Shares are in [0, 1]."""

    step: int
    """Optimizer steps taken."""
    threshold: float
    """Cut-off on scores in force."""
    requested: float
    """Value of the schedule."""
    sparsity: float
    """Share of possible blocks pruned, over all layers and heads."""
    layer_sparsity: dict[str, float]
    """Layer -> share of its possible blocks pruned."""
    change: dict[str, float]
    """Layer -> change of the pattern at this decision (Jaccard distance)."""
    mass_kept: dict[str, float]
    """Layer -> share of dense attention probability that falls into kept blocks."""
    settled: tuple[str, ...] = ()
    """Layers that settled at this decision."""
