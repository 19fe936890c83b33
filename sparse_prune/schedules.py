"""Schedules: what value is requested at an optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A value that moves from `initial` to `final` between two optimizer steps.

    What the value means is the caller's choice: `AttentionPruning(sparsity=...)` reads it as a share of
    prunable blocks in [0, 1), `AttentionPruning(threshold=...)` as a cut-off compared with scores.

    Raises:
        ValueError: If a value is negative or not finite, or if the steps are reversed.
    """

    final: float
    """Value from `end_step` on. Finite and at least `initial`."""
    end_step: int
    """Optimizer step at which `final` is reached. At least `begin_step`."""
    initial: float = 0.0
    """Value up to `begin_step`. Finite, at least 0."""
    begin_step: int = 0
    """Optimizer step at which the value starts to move. At least 0."""

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
        if self.final < self.initial:
            raise ValueError(
                f"`final` must be at least `initial` ({self.initial}), got {self.final}. Swap them to prune gradually."
            )
        if self.begin_step < 0:
            raise ValueError(f"`begin_step` must be at least 0, got {self.begin_step}.")
        if self.end_step < self.begin_step:
            raise ValueError(
                f"`end_step` must be at least `begin_step` ({self.begin_step}), got {self.end_step}. "
                "Swap them, or leave `begin_step` at 0."
            )

    def __call__(self, step: int) -> float:
        """Value in force at an optimizer step."""
        return self.initial + (self.final - self.initial) * self.shape(self.progress(step))

    def progress(self, step: int) -> float:
        """Share of the ramp that lies behind `step`, in [0, 1]."""
        if step >= self.end_step:
            return 1.0
        if step <= self.begin_step:
            return 0.0
        return (step - self.begin_step) / (self.end_step - self.begin_step)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Monotone map of [0, 1] onto itself."""


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """`final` from `begin_step` on, `initial` before it: one-shot pruning."""

    end_step: int = -1
    """Follows `begin_step`; leave it out."""

    def __post_init__(self) -> None:
        if self.end_step not in (-1, self.begin_step):
            raise ValueError(
                f"`end_step` of a ConstantSchedule is its `begin_step` ({self.begin_step}), got {self.end_step}. "
                "Leave it out, or use LinearSchedule for a ramp."
            )
        object.__setattr__(self, "end_step", self.begin_step)
        super().__post_init__()

    def shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """Equal increments."""

    def shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Half a cosine: slow at both ends."""

    def shape(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(Schedule):
    """Fast at first, slow at the end, when every further block hurts (Zhu & Gupta, arXiv:1710.01878)."""

    def shape(self, progress: float) -> float:
        return float(1.0 - (1.0 - progress) ** 3)


@dataclass(frozen=True, kw_only=True)
class ExponentialSchedule(Schedule):
    """Slow at first, then faster by a constant factor: thresholds span orders of magnitude."""

    rate: float = 5.0
    """Speed at the end over speed at the begin is exp(rate). Positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.rate) or self.rate <= 0:
            raise ValueError(f"`rate` must be a positive number, got {self.rate}. Around 5 suits thresholds.")

    def shape(self, progress: float) -> float:
        return math.expm1(self.rate * progress) / math.expm1(self.rate)
