"""Launch configurations measured on the device at hand, kept on disk by device and version."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import KERNELS, Kernel, LaunchConfig, candidates
from sparse_prune.kernels.triton.launch import launch_dkdv, launch_dq, launch_forward
from sparse_prune.kernels.triton.tables import index_tables
from sparse_prune.pattern import BlockPattern

log = logging.getLogger(__name__)

Measure = Callable[[Callable[[], object]], float]
"""Takes a launch, gives its milliseconds."""

_KNOWN: dict[Path, dict[str, list[int]]] = {}  # what was read from disk, by file


def cache_file() -> Path:
    """Where measured configurations are kept: under `SPARSE_PRUNE_CACHE_DIR`, or the user's cache folder."""
    folder = os.environ.get("SPARSE_PRUNE_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_prune"
    return (Path(folder) if folder else base) / "triton_tuning.json"


def tuned(
    kernel: Kernel, pattern: BlockPattern, head_dim: int, dtype: torch.dtype, device: torch.device
) -> LaunchConfig | None:
    """The measured configuration for such a call on this device; None if `tune` never saw one."""
    entry = _read(cache_file()).get(_key(kernel, pattern, head_dim, dtype, device))
    return None if entry is None else LaunchConfig((entry[0], entry[1]), entry[2], entry[3])


def tune(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, measure: Measure | None = None
) -> dict[Kernel, LaunchConfig]:
    """Measure the candidates of every kernel on a call, and keep the fastest for calls like it.

    What is known already is not measured again. Calls are alike if device, versions, dtype, head size, block,
    causality and length (to a power of two) agree.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        key: (batch, num_kv_heads, kv_len, head_dim).
        value: As `key`.
        pattern: The connections to keep, for these lengths.
        measure: Times one launch; by default Triton's `do_bench`.

    Raises:
        ValueError: If head size or block size are not supported.
    """
    found: dict[Kernel, LaunchConfig] = {}
    missing: dict[str, list[int]] = {}
    for kernel in KERNELS:
        call = (kernel, pattern, query.shape[3], query.dtype, query.device)
        config = tuned(*call)
        if config is None:
            config = _fastest(kernel, query, key, value, pattern, measure or _bench)
            missing[_key(*call)] = [*config.tile, config.num_warps, config.num_stages]
        found[kernel] = config
    if missing:
        _write(cache_file(), missing)
    return found


def _fastest(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, measure: Measure
) -> LaunchConfig:
    query, key, value = query.detach(), key.detach(), value.detach()
    major, minor = torch.cuda.get_device_capability(query.device) if query.device.type == "cuda" else (9, 0)
    times: dict[LaunchConfig, float] = {}
    for config in candidates(kernel, 10 * major + minor, query.shape[3], query.dtype, pattern.block_size):
        try:
            times[config] = measure(_launcher(kernel, query, key, value, pattern, config))
        except OutOfResources as error:
            log.debug("%s with %s: %s", kernel, config, error)
    if not times:
        raise ValueError(
            f"No configuration of the {kernel} kernel fits this device at head_dim {query.shape[3]}. "
            "Use backend='gather'."
        )
    best = min(times, key=lambda config: times[config])
    log.info("%s: %s, %.3f ms; the shipped one %.3f ms", kernel, best, times[best], next(iter(times.values())))
    return best


def _launcher(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, config: LaunchConfig
) -> Callable[[], object]:
    tables = index_tables(pattern, config.tile, query.device)
    causal, options = pattern.causal, AttentionOptions()
    rows, cols = tables.rows.tensors(), tables.cols.tensors()
    if kernel == "forward":
        return lambda: launch_forward(query, key, value, rows, config, causal, options)
    # The time of a backward pass does not hang on what is in these.
    rest = (query, torch.zeros(query.shape[:3], device=query.device), torch.zeros(query.shape[:3], device=query.device))
    if kernel == "dq":
        return lambda: launch_dq(query, key, value, *rest, rows, config, causal, options)
    return lambda: launch_dkdv(query, key, value, *rest, cols, config, causal, options)


def _bench(launch: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(launch, warmup=10, rep=50, return_mode="median"))


def _key(kernel: Kernel, pattern: BlockPattern, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    length = 1 << (max(pattern.q_len, pattern.kv_len) - 1).bit_length()
    parts: tuple[Any, ...] = (
        name, torch.__version__, triton.__version__, kernel, dtype, head_dim, *pattern.block_size,
        "causal" if pattern.causal else "bidirectional", length,
    )  # fmt: skip
    return " | ".join(map(str, parts))


def _read(path: Path) -> dict[str, list[int]]:
    if path not in _KNOWN:
        try:
            entries = json.loads(path.read_text())["entries"] if path.exists() else {}
            _KNOWN[path] = {key: list(entry) for key, entry in entries.items() if _sound(entry)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is not readable and is not used: %r. It is written anew.", path, error)
            _KNOWN[path] = {}
    return _KNOWN[path]


def _sound(entry: list[int]) -> bool:
    """Whether an entry can be a configuration: [query tile, key tile, warps, stages]."""
    tile_q, tile_k, warps, stages = entry
    return {tile_q, tile_k} <= {16, 32, 64, 128, 256} and warps in (4, 8) and stages in (1, 2, 3, 4)


def _write(path: Path, entries: dict[str, list[int]]) -> None:
    """Add entries to the file, whole or not at all. A cache that cannot be written is no reason to stop a run."""
    _KNOWN.pop(path, None)  # another process may have added to it
    _KNOWN[path] = _read(path) | entries
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"entries": _KNOWN[path]}, indent=1))
        os.replace(partial, path)
    except OSError as error:
        log.warning("Measured configurations cannot be kept in %s: %r. They last as long as this process.", path, error)
        with contextlib.suppress(OSError):
            partial.unlink()
