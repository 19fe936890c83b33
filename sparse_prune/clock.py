"""Timing of work that a device does while its host runs ahead."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_RUNS = 5
_CYCLES = 2e9  # per second, more than a GPU has: it rather waits too long than too short
_LONGEST_WAIT = 1.0  # seconds


def milliseconds(run: Callable[[], object], device: torch.device, hidden: bool = True) -> float:
    """Measure how long a run takes, in milliseconds.

    On a GPU this is the device's own time if the host runs ahead in training and so hides the launching of kernels: the
    device waits until the host has launched several runs, and events on the device measure their mean. If it does not,
    it is the mean wall-clock time of several runs. Elsewhere it is the wall-clock time of a single run.

    Args:
        run: The work to measure; every call must take equally long. On a GPU it is called six times.
        device: Where it runs.
        hidden: Whether training hides the launching of kernels on a GPU, as `hides_host` says.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _on_gpu(run) if hidden else _by_the_wall(run, device)
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


def _by_the_wall(run: Callable[[], object], device: torch.device) -> float:
    run()
    start = now(device)
    for _ in range(_RUNS):
        run()
    return 1e3 * (now(device) - start) / _RUNS


def hides_host(device: torch.device) -> bool:
    """Return whether the host runs ahead of a device, so that the launching of kernels costs no time.

    Ask at the end of a backward pass, before anything waits for the device.

    Args:
        device: On any other than a GPU there is nothing to hide.
    """
    return device.type != "cuda" or not torch.cuda.current_stream(device).query()


def now(device: torch.device) -> float:
    """Read the clock, in seconds, once the device has finished all work that it was given.

    Args:
        device: Only a GPU is waited for.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
