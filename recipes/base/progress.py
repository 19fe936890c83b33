"""Logs the progress of a run and the time that it will take, in lines that also suit a log file."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

log = logging.getLogger(__name__)


class Heartbeat:
    """A context manager that logs the current activity after every `seconds` without a message.

    Args:
        what: The activity, as in "Still at ...".
        seconds: Seconds of silence, positive.
    """

    def __init__(self, what: str, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sparse_prune-heartbeat", daemon=True)
        self.at(what)

    def at(self, what: str) -> None:
        """Set another activity."""
        self._what, self._since = what, time.monotonic()
        self.heard()

    def heard(self) -> None:
        """Note that a message was logged."""
        self._heard = time.monotonic()

    @property
    def silent(self) -> bool:
        """Whether `seconds` have passed without a message."""
        return time.monotonic() - self._heard >= self.seconds

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self.seconds / 10):
            if self.silent:
                log.info("Still at %s, for %s.", self._what, spoken(time.monotonic() - self._since))
                self.heard()


class Progress(pl.Callback):
    """Logs, on rank 0, how long the run will take: after the first step, and then once a minute.

    After a minute of silence it logs the current activity, such as a long step, validation or a test.

    Args:
        twin: Whether a run of the same length will follow.
        seconds: Seconds between two lines, positive.
    """

    def __init__(self, twin: bool = False, seconds: float = 60.0) -> None:
        self.twin, self.seconds = twin, seconds
        self._heartbeat: Heartbeat | None = None
        self._begun, self._said, self._second = 0.0, 0.0, 0.0  # seconds of the clock; when the second step began
        self._first, self._step = 0, 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._heartbeat = Heartbeat("set-up", self.seconds).__enter__()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.__exit__(None, None, None)
            self._heartbeat = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.global_step
        self._step = self._first

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at(f"step {trainer.global_step + 1}")
        if trainer.global_step == self._first + 1 and self._second < self._begun:
            self._second = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, heartbeat = trainer.global_step, self._heartbeat
        if heartbeat is None or step == self._step:
            return
        if self._step == self._first:
            log.info("%s", self._forecast(step, trainer.estimated_stepping_batches))
            self._said = time.monotonic()
        elif time.monotonic() - self._said >= self.seconds:
            log.info("%s", self._remainder(step, trainer.estimated_stepping_batches))
            self._said = time.monotonic()
        self._step = step

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at("validation")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at("the test")

    def _seconds_left(self, step: int, last: float) -> float:
        """Estimate by the first step, then by the later ones: pruning asks and measures once, after the first."""
        now, later = time.monotonic(), step - self._first - 1
        return ((now - self._second) / later if later else now - self._begun) * (last - step)

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
