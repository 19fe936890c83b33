"""Measures launch configurations on the device at hand, and keeps them on disk by device and versions."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_prune.files import whole_file
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import KERNELS, Call, Kernel, LaunchConfig, candidates, capability, traits
from sparse_prune.kernels.triton.launch import launch_dkdv, launch_dq, launch_forward
from sparse_prune.kernels.triton.tables import heads_together, index_tables
from sparse_prune.pattern import BlockPattern

log = logging.getLogger(__name__)

Measure = Callable[[Callable[[], object]], float]
"""Takes a launch, gives its milliseconds."""

_KNOWN: dict[Path, tuple[object, dict[str, list[int]]]] = {}  # file -> its stamp when it was read, and its entries


def cache_file() -> Path:
    """Return the file of measured configurations: under `SPARSE_PRUNE_CACHE_DIR`, or the user's cache folder."""
    return _cache_file(os.environ.get("SPARSE_PRUNE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME"))


@cache
def _cache_file(folder: str | None, user: str | None) -> Path:
    base = Path(folder) if folder else (Path(user) if user else _home() / ".cache") / "sparse_prune"
    return base / "triton_tuning.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user that the system does not know, as in containers
        return Path(tempfile.gettempdir())


def revision() -> tuple[object, ...]:
    """Return what changes when this process or another one measures a configuration, without reading the file."""
    path = cache_file()
    return path, _stamp(path), len(_KNOWN[path][1]) if path in _KNOWN else 0


def tuned(kernel: Kernel, pattern: BlockPattern, call: Call, device: torch.device) -> LaunchConfig | None:
    """Return the measured configuration for such a call on this device; None if none was measured.

    What another process has measured meanwhile counts: under DDP the first rank measures for all.
    """
    entry = _read(cache_file()).get(_key(kernel, pattern, call, device))
    return None if entry is None else LaunchConfig.of(entry[:-1])


def tune(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions | None = None,
    measure: Measure | None = None, seconds: float = math.inf,
) -> dict[Kernel, LaunchConfig]:  # fmt: skip
    """Measure the candidates of every kernel on a call, shaped as in `attend`, and keep the fastest for calls like it.

    What is known already is not measured again; what was broken off is continued. Calls are alike if they agree in
    device, versions, dtype, head size, block, causality, length (to a power of two), the kinds of masks, soft cap or
    not, and dropout or not.

    Args:
        query: As in `attend`, like key, value, pattern and options.
        measure: Times one launch; by default Triton's `do_bench`.
        seconds: Limit, compiling included: a kernel's candidates begin within its share. What was fastest by then is
            kept, and a later call goes on with the other candidates. With 0 nothing is measured.

    Returns:
        Kernel -> the fastest configuration so far.

    Raises:
        ValueError: If head size or block size are not supported, or no configuration fits the device.
    """
    options = options or AttentionOptions()
    call = Call(query.shape[3], query.dtype, pattern.block_size, *traits(options))
    end = time.monotonic() + seconds
    found: dict[Kernel, LaunchConfig] = {}
    news: dict[str, list[int]] = {}
    for kernel, waiting in zip(KERNELS, (3, 2, 1), strict=True):
        name = _key(kernel, pattern, call, query.device)
        entry, untried = _read(cache_file()).get(name), candidates(kernel, capability(query.device), call)
        best = [] if entry is None else [LaunchConfig.of(entry[:-1])]
        tried = 0 if entry is None else entry[-1]
        left, untried = end - time.monotonic(), untried[tried:]
        if untried and left > 0:
            launcher = partial(_launcher, kernel, query.detach(), key.detach(), value.detach(), pattern, options)
            limit = time.monotonic() + left / waiting
            fastest, seen = _fastest(kernel, call, [*best, *untried], launcher, measure or _bench, limit)
            best, tried = [fastest], tried + seen - len(best)
            news[name] = [*fastest.numbers(), tried]
        if best:
            found[kernel] = best[0]
    if news:
        _write(cache_file(), news)
    return found


def _fastest(
    kernel: Kernel, call: Call, configs: list[LaunchConfig],
    launcher: Callable[[LaunchConfig], Callable[[], object]], measure: Measure, limit: float,
) -> tuple[LaunchConfig, int]:  # fmt: skip
    """The fastest configuration, and how many were looked at until the limit, a time of the monotonic clock."""
    times: dict[LaunchConfig, float] = {}
    seen = 0
    for config in configs:
        if times and time.monotonic() > limit:
            log.info("%s: %d configurations are left for the next run to measure.", kernel, len(configs) - seen)
            break
        seen += 1
        try:
            times[config] = measure(launcher(config))
        except OutOfResources as error:
            log.debug("The %s kernel does not fit with %s: %s", kernel, config, error)
        except Exception as error:  # a compiler that fails on one candidate says nothing of the others
            if config == configs[0]:
                raise
            log.warning("The %s kernel is not tried with %s: %s: %s", kernel, config, type(error).__name__, error)
    if not times:
        raise ValueError(
            f"`head_dim` must fit a configuration of the {kernel} kernel on this device, got {call.head_dim}. "
            "Use backend='gather'."
        )
    best = min(times, key=lambda config: times[config])
    before = f"{times[configs[0]]:.3f} ms" if configs[0] in times else "does not fit"
    log.info("The %s kernel is fastest with %s, %.3f ms; before: %s.", kernel, best, times[best], before)
    return best, seen


def _launcher(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions,
    config: LaunchConfig,
) -> Callable[[], object]:  # fmt: skip
    batch, kv_heads = key.shape[:2]
    together = heads_together(pattern, config.tile, kv_heads, batch, query.device) if kernel == "dkdv" else None
    tables = index_tables(pattern, config.tile, query.device, together).tensors()
    if kernel == "forward":
        return lambda: launch_forward(query, key, value, tables, config, pattern.causal, options)
    # The time of a backward pass does not depend on the numbers in gradient, output and row sums.
    sums = torch.zeros(query.shape[:3], dtype=torch.float32, device=query.device)
    if kernel == "dq":
        return lambda: launch_dq(query, key, value, query, query, sums, tables, config, pattern.causal, options)
    return lambda: launch_dkdv(query, key, value, query, sums, sums, tables, config, pattern.causal, options)


def _bench(launch: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(launch, warmup=10, rep=50, return_mode="median"))


def _key(kernel: Kernel, pattern: BlockPattern, call: Call, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    length = 1 << (max(pattern.q_len, pattern.kv_len) - 1).bit_length()
    parts: tuple[Any, ...] = (
        name, torch.__version__, triton.__version__, kernel, call.dtype, call.head_dim, *call.block_size,
        "causal" if pattern.causal else "bidirectional", length, f"masks {call.masks}",
        "soft cap" if call.softcap else "no soft cap", "dropout" if call.dropout else "no dropout",
    )  # fmt: skip
    return " | ".join(map(str, parts))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever the file is written; None without a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path) -> dict[str, list[int]]:
    """What the file holds and what this process could not write into it."""
    stamp = _stamp(path)
    known = _KNOWN[path][1] if path in _KNOWN else {}
    if path not in _KNOWN or _KNOWN[path][0] != stamp:
        _KNOWN[path] = (stamp, known | _load(path))
    return _KNOWN[path][1]


def _load(path: Path) -> dict[str, list[int]]:
    try:
        entries = json.loads(path.read_text())["entries"] if path.exists() else {}
        return {key: list(entry) for key, entry in entries.items() if _sound(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read: %r. Configurations are measured again, and the file is replaced.", path, error)
        return {}


def _sound(entry: list[int]) -> bool:
    """Whether an entry can be a configuration and how many candidates it won against, itself included:
    [query tile, key tile, warps, stages, span, candidates]."""
    if isinstance(entry, list) and len(entry) == 4:  # of an older version
        return False
    tile_q, tile_k, warps, stages, span, tried = entry
    sides = {tile_q, tile_k} <= {16, 32, 64, 128, 256}
    return sides and warps in (4, 8) and stages in (1, 2, 3, 4) and span in (1, 2) and tried > 0


def _write(path: Path, entries: dict[str, list[int]]) -> None:
    """Add entries to the file, whole or not at all. A cache that cannot be written is no reason to stop a run."""
    entries = _read(path) | entries
    try:
        with whole_file(path) as file:
            file.write_text(json.dumps({"entries": entries}, indent=1))
    except OSError as error:
        log.warning(
            "Measured configurations cannot be written to %s: %r. They last as long as this process; "
            "SPARSE_PRUNE_CACHE_DIR names another folder.",
            path,
            error,
        )
    _KNOWN[path] = (_stamp(path), entries)
