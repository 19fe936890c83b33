"""Logs the progress of a run and the time that it will take, in lines that also suit a log file."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

log = logging.getLogger(__name__)


class Progress(pl.Callback):
    """Logs, on rank 0, how long the run will take: after the first step, and then once a minute.

    Args:
        twin: Whether a run of the same length will follow.
        seconds: Seconds between two lines, positive.
    """

    def __init__(self, twin: bool = False, seconds: float = 60.0) -> None:
        self.twin, self.seconds = twin, seconds
        self._begun, self._said = 0.0, 0.0  # seconds of the clock
        self._first, self._step = 0, 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.global_step
        self._step = self._first

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or not trainer.is_global_zero:
            return
        first, self._step = self._step == self._first, step
        if first or time.monotonic() - self._said >= self.seconds:
            line = self._forecast if first else self._remainder
            log.info("%s", line(step, trainer.estimated_stepping_batches))
            self._said = time.monotonic()

    def _seconds_left(self, step: int, last: float) -> float:
        done = step - self._first
        return (time.monotonic() - self._begun) / done * (last - step)

    def _forecast(self, step: int, last: float) -> str:
        seconds = time.monotonic() - self._begun
        took = f"The first step took {spoken(seconds)}"
        if last == float("inf"):
            return f"{took}; the number of steps is not set."
        more = ", and the dense run after it as long again" if self.twin else ""
        left = spoken(self._seconds_left(step, last))
        return f"{took}: {int(last) - step} more will take about {left}{more}."

    def _remainder(self, step: int, last: float) -> str:
        if last == float("inf"):
            return f"Step {step} is done, after {spoken(time.monotonic() - self._begun)}."
        return f"Step {step} of {int(last)} is done; about {spoken(self._seconds_left(step, last))} left."


def spoken(seconds: float) -> str:
    """Format seconds for people: "8.4 s", "95 s", "12 min", "3 h 20 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
