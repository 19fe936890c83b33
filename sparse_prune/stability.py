"""Settling: when a layer's pattern has stopped moving."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StabilityTracker:
    """Settled once the pattern changed by at most `min_delta` in `patience` checks in a row.

    Raises:
        ValueError: If `min_delta` is outside [0, 1] or `patience` is below 1.
    """

    min_delta: float = 0.05
    """Largest change between two patterns that still counts as standing still (Jaccard distance)."""
    patience: int = 3
    """Checks in a row that must stand still. At least 1."""
    calm_checks: int = 0
    """Checks in a row that stood still so far."""
    change: float = 1.0
    """Change at the last check."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_delta <= 1.0:
            raise ValueError(f"`min_delta` must lie in [0, 1], got {self.min_delta}.")
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {self.patience}.")

    @property
    def settled(self) -> bool:
        """Whether the pattern has settled."""
        return self.calm_checks >= self.patience

    def update(self, change: float) -> bool:
        """Take the change since the last pattern; return whether the pattern has settled."""
        self.change = change
        self.calm_checks = self.calm_checks + 1 if change <= self.min_delta else 0
        return self.settled
