"""A clock for work that a device does while its host runs ahead."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_RUNS = 5
_CYCLES = 2e9  # per second, more than a GPU has: it waits rather too long than too short
_LONGEST_WAIT = 1.0  # seconds


def milliseconds(run: Callable[[], object], device: torch.device, hidden: bool = True) -> float:
    """Time of one run.

    On a GPU the device's own time, if training hides what the host takes to launch kernels: the device is kept waiting
    until the host has launched several runs, and events on the device tell their mean. Where the host is not ahead, the
    wall clock's mean of several runs. Elsewhere the wall clock's time of a single run.

    Args:
        run: Takes no longer from one call to the next; on a GPU it is called six times.
        device: Where it runs.
        hidden: Whether the host is ahead of its GPU in training, as `hides_host` tells.
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
    """Whether a device has still to do some of what its host launched: then what launching takes costs no time.

    Ask at the end of a backward pass, before anything waits for the device.

    Args:
        device: Others than a GPU have nothing to hide.
    """
    return device.type != "cuda" or not torch.cuda.current_stream(device).query()


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given.

    Args:
        device: Others than a GPU are never behind.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
