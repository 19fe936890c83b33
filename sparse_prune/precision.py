"""The number type that a machine multiplies fastest, measured."""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Literal

import torch

log = logging.getLogger(__name__)
_SIZE = 256  # of the matrices: large enough for the fast path, 0.3 s where torch reaches only 0.1 GFLOP/s
_SECONDS = 0.02  # least time to measure a type


def fast_dtype(wanted: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Choose the type to compute in: `wanted`, or float32 if the device multiplies that at least as fast.

    On a CPU both are measured for some milliseconds, once per process: a CPU's list of instructions does not tell how
    torch and oneDNN use them, nor what `ONEDNN_MAX_CPU_ISA` allows. A log line says if float32 replaces `wanted`.

    Args:
        wanted: bfloat16 or float16.
        device: Where to compute.
    """
    kind = torch.device(device).type
    if wanted == torch.float32 or _is_fast(wanted, kind):
        return wanted
    return torch.float32


def fast_precision(device: torch.device | str) -> Literal["bf16-mixed", "32-true"]:
    """Choose Lightning's `precision`: "bf16-mixed" if bfloat16 is fast, else "32-true"."""
    return "bf16-mixed" if fast_dtype(torch.bfloat16, device) == torch.bfloat16 else "32-true"


def fast_autocast(device: torch.device | str) -> torch.autocast:
    """Return bfloat16 autocast if bfloat16 is fast, else a context that changes nothing."""
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
    """Measure the best speed within `_SECONDS` of this thread's own CPU time, which other programs do not stretch."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times: list[float] = []
    with torch.no_grad():
        while sum(times) < _SECONDS or len(times) < 4:  # the first may compile, others may be disturbed
            start = time.thread_time()
            torch.mm(matrix, matrix)
            times.append(time.thread_time() - start)
    return 2e-9 * _SIZE**3 / max(min(times), 1e-9)
