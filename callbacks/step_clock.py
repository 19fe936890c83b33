"""Measures the speed of training steps over intervals, without waiting for a GPU at every step."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from sparse_prune.metrics import STEP_SECONDS, TOKENS_PER_SECOND

_Mark = float | torch.cuda.Event
"""A point in time: seconds of the host's clock, or an event in the stream of a GPU."""


class StepClock:
    """Measures seconds per optimizer step and tokens per second, over intervals of several steps.

    A step's time is that of its batches, without loading of data and validation. A GPU runs behind its host, so there
    its own clock is read: events are recorded around every batch, and waited for only at the end of an interval. A copy
    or unpickled clock starts anew.
    """

    def __init__(self) -> None:
        self._begin: _Mark = 0.0
        self._spans: deque[tuple[_Mark, _Mark]] = deque()  # batches that a GPU may still compute
        self._seconds = 0.0
        self._tokens = 0
        self._step: int | None = None  # optimizer step at which the interval began; None: the first step warms up
        self._last: dict[str, float] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def start(self, device: torch.device) -> None:
        """Mark the start of a batch."""
        self._begin = _mark(device)

    def stop(self, device: torch.device, tokens: int, apart: float = 0.0) -> None:
        """Mark the end of a batch.

        Args:
            device: The module's device.
            tokens: Tokens in the batch, of this process.
            apart: Seconds since `start` that are not part of the step; the device must have been idle when they began.
        """
        self._spans.append((self._begin, _mark(device)))
        while self._spans and _is_over(self._spans[0][1]):
            self._seconds += _seconds(*self._spans.popleft())
        self._seconds -= apart
        self._tokens += tokens

    def read(self, step: int, every: int) -> dict[str, float]:
        """Close the interval if it is long enough and return its metrics, or else none."""
        if self._step is None:
            if step:
                self._begin_interval(step)
            return {}
        steps = step - self._step
        if steps < max(1, every):
            return {}
        # Waiting for the last span first, as all others are over then.
        seconds = self._seconds + sum(_seconds(*span) for span in reversed(self._spans))
        if seconds <= 0.0:
            return {}
        self._last = {STEP_SECONDS.key: seconds / steps, TOKENS_PER_SECOND.key: self._tokens / seconds}
        self._begin_interval(step)
        return self._last.copy()

    def at_swap(self) -> dict[str, float]:
        """Return the last metrics under the keys that mark swaps on the curves."""
        return {f"{key}_at_swap": value for key, value in self._last.items()}

    def _begin_interval(self, step: int) -> None:
        self._spans.clear()
        self._step, self._seconds, self._tokens = step, 0.0, 0


def _mark(device: torch.device) -> _Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event


def _is_over(mark: _Mark) -> bool:
    return isinstance(mark, float) or bool(mark.query())  # type: ignore[no-untyped-call, unused-ignore]


def _seconds(begin: _Mark, end: _Mark) -> float:
    """Return the seconds between two marks of one device, after waiting for a GPU to reach the second."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
