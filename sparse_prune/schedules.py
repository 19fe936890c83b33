"""Schedules: the value that is requested at each optimizer step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from numbers import Real
from typing import Self

from sparse_prune.ranges import check_range


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A value that moves from `initial` to `final` between two optimizer steps.

    `AttentionPruning(sparsity=...)` reads the value as a share of the possible blocks, in [0, 1),
    `AttentionPruning(threshold=...)` as a cut-off compared with scores.

    A step is a whole number of optimizer steps, or a share of the run as a float: 800 is a step, 0.8 is 80 % of the
    run, 1.0 all of it. Shares need a run of known length: `AttentionPruning` asks the Trainer, other code calls
    `resolved`.

    Raises:
        ValueError: If a value is negative or not finite, a share lies outside [0, 1], or the steps are reversed.
    """

    final: float
    """Value from `end_step` on. Finite and at least `initial`."""
    end_step: int | float
    """Optimizer step, or share of the run in [0, 1], at which `final` is reached. Not before `begin_step`."""
    initial: float = 0.0
    """Value up to `begin_step`. Finite and at least 0."""
    begin_step: int | float = 0
    """Optimizer step of at least 0, or share of the run in [0, 1], at which the value starts to move."""

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value) or value < 0:
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value!r}. Write 0.7, say.")
        if self.final < self.initial:
            raise ValueError(
                f"`final` must be at least `initial` ({self.initial}), got {self.final}. Swap them to prune gradually."
            )
        for name in ("begin_step", "end_step"):
            value = getattr(self, name)
            if not _is_number(value) or (isinstance(value, float) and not 0.0 <= value <= 1.0):
                raise ValueError(
                    f"`{name}` must be a whole number of optimizer steps or a share of the run in [0, 1], "
                    f"got {value!r}. Write 800 for a step, 0.8 for 80 % of the run."
                )
        check_range("[0, inf)", begin_step=self.begin_step)
        # A step and a share can be compared only once the run's length is known.
        alike = isinstance(self.begin_step, float) == isinstance(self.end_step, float)
        if alike and self.end_step < self.begin_step:
            raise ValueError(
                f"`end_step` must be at least `begin_step` ({self.begin_step}), got {self.end_step}. "
                "Swap them, or leave `begin_step` at 0."
            )

    @property
    def relative(self) -> bool:
        """Whether a step is a share of the run, so that the run's length must be known."""
        return isinstance(self.begin_step, float) or isinstance(self.end_step, float)

    def resolved(self, total_steps: int) -> Self:
        """Return the schedule with shares converted to optimizer steps, rounded to the nearest.

        Args:
            total_steps: Optimizer steps of the run. At least 1.

        Raises:
            ValueError: If `total_steps` is below 1, or the steps turn out to be reversed.
        """
        check_range("[1, inf)", total_steps=total_steps)
        if not self.relative:
            return self
        begin, end = (
            round(step * total_steps) if isinstance(step, float) else step for step in (self.begin_step, self.end_step)
        )
        if end < begin:
            raise ValueError(
                f"`end_step` must not come before `begin_step`, got {self.end_step} and {self.begin_step}: steps {end} "
                f"and {begin} of {total_steps}. Raise `end_step`, or lower `begin_step`."
            )
        return replace(self, begin_step=begin, end_step=end)

    def __call__(self, step: int) -> float:
        """Return the value in force at an optimizer step.

        Raises:
            ValueError: If the schedule is `relative`.
        """
        return self.initial + (self.final - self.initial) * self.shape(self.progress(step))

    def progress(self, step: int) -> float:
        """Return the share of the ramp that is done at `step`, in [0, 1].

        Raises:
            ValueError: If the schedule is `relative`.
        """
        if self.relative:
            raise ValueError(
                f"`begin_step` and `end_step` must be optimizer steps, got {self.begin_step} and {self.end_step}, of "
                "which one is a share of the run. Call `schedule.resolved(total_steps)` first."
            )
        if step >= self.end_step:
            return 1.0
        if step <= self.begin_step:
            return 0.0
        return (step - self.begin_step) / (self.end_step - self.begin_step)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Map the progress of the ramp, in [0, 1], to that of the value, in [0, 1], monotonically."""


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """`final` from `begin_step` on, `initial` before it: one-shot pruning."""

    end_step: int | float = -1
    """Follows `begin_step`; leave it out."""

    def __post_init__(self) -> None:
        if self.end_step not in (-1, self.begin_step):
            raise ValueError(
                f"`end_step` of a ConstantSchedule must be its `begin_step` ({self.begin_step}), got {self.end_step}. "
                "Leave it out, or use LinearSchedule for a ramp."
            )
        object.__setattr__(self, "end_step", self.begin_step)
        super().__post_init__()

    def shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """Rises by equal increments."""

    def shape(self, progress: float) -> float:
        return progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Rises along half a cosine: slowly at both ends."""

    def shape(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(Schedule):
    """Rises fast at first and slowly at the end, when every further block hurts (Zhu & Gupta, arXiv:1710.01878)."""

    def shape(self, progress: float) -> float:
        return float(1.0 - (1.0 - progress) ** 3)


@dataclass(frozen=True, kw_only=True)
class ExponentialSchedule(Schedule):
    """Rises slowly at first, then ever faster by a constant factor: thresholds span orders of magnitude."""

    rate: float = 5.0
    """The slope at the end is exp(rate) times that at the start. Positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("(0, inf)", "Around 5 suits thresholds.", rate=self.rate)

    def shape(self, progress: float) -> float:
        return math.expm1(self.rate * progress) / math.expm1(self.rate)
