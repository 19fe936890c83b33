"""Which number type a machine multiplies fast, found by multiplying."""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Literal

import torch

log = logging.getLogger(__name__)
_SIZE = 256  # of the matrices: large enough for the fast path, 0.3 s where torch reaches only 0.1 GFLOP/s
_SECONDS = 0.02  # how long a type is tried, at least twice


def fast_dtype(wanted: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type to compute in: `wanted`, or float32 where the device multiplies that at least as fast.

    A CPU is asked by a multiplication of each type, milliseconds long: what a CPU lists among its instructions says
    little of what torch and oneDNN make of them, and nothing of `ONEDNN_MAX_CPU_ISA`. The answer is kept for the
    process. A log line says so where float32 takes the place of `wanted`.

    Args:
        wanted: bfloat16 or float16.
        device: Where to compute.
    """
    kind = torch.device(device).type
    if wanted == torch.float32 or _is_fast(wanted, kind):
        return wanted
    return torch.float32


def fast_precision(device: torch.device | str) -> Literal["bf16-mixed", "32-true"]:
    """The same as Lightning's `precision`: "bf16-mixed" where bfloat16 is fast, else "32-true".

    Args:
        device: Where to compute.
    """
    return "bf16-mixed" if fast_dtype(torch.bfloat16, device) == torch.bfloat16 else "32-true"


def fast_autocast(device: torch.device | str) -> torch.autocast:
    """The same as a context: bfloat16 autocast where that is fast, else one that changes nothing.

    Args:
        device: Where to compute.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=fast_dtype(torch.bfloat16, device) == torch.bfloat16)


@cache
def _is_fast(wanted: torch.dtype, kind: str) -> bool:
    name = str(wanted).removeprefix("torch.")
    if kind == "cuda":
        fast = wanted == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "which this GPU only emulates"
    elif kind == "cpu":
        speed, single = _gflops(wanted), _gflops(torch.float32)
        fast = speed > single
        reason = f"which a thread of this CPU multiplies at {speed:.3g} GFLOP/s, float32 at {single:.3g}"
    else:
        fast, reason = False, f"which is not known to be fast on {kind}"
    if not fast:
        log.info("Precision: float32, not %s, %s.", name, reason)
    return fast


def _gflops(dtype: torch.dtype) -> float:
    """The best of what fits into `_SECONDS` of this thread's own time, which other programs do not stretch."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times: list[float] = []
    with torch.no_grad():
        while sum(times) < _SECONDS or len(times) < 4:  # the first may compile, others be disturbed
            start = time.thread_time()
            torch.mm(matrix, matrix)
            times.append(time.thread_time() - start)
    return 2e-9 * _SIZE**3 / max(min(times), 1e-9)
