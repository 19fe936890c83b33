"""A clock for work that a device does while its host runs ahead."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_RUNS = 5
_CYCLES = 2e9  # per second, more than a GPU has: it waits rather too long than too short
_LONGEST_WAIT = 1.0  # seconds


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run.

    On a GPU the device's own time: in training the host is ahead, and what it takes to launch kernels is hidden. So the
    device is kept waiting until the host has launched several runs, and events on the device tell their mean.
    Elsewhere the wall clock's time of a single run.

    Args:
        run: Takes no longer from one call to the next; on a GPU it is called six times.
        device: Where it runs.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _on_gpu(run)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _on_gpu(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    launching = _RUNS * (time.perf_counter() - start)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call, unused-ignore]
    torch.cuda._sleep(int(_CYCLES * min(1.5 * launching, _LONGEST_WAIT)))  # type: ignore[no-untyped-call, unused-ignore]
    begin.record()
    for _ in range(_RUNS):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _RUNS


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given.

    Args:
        device: Others than a GPU are never behind.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
