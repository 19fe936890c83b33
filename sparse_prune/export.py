"""Patterns on disk: a safetensors file with a versioned header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_prune.pattern import BlockPattern

FORMAT = "sparse_prune.patterns"
VERSION = 1


def save_patterns(patterns: Mapping[str, BlockPattern], path: str | os.PathLike[str]) -> Path:
    """Write patterns atomically: the file is whole or not there.

    Raises:
        ValueError: If there are no patterns.
    """
    if not patterns:
        raise ValueError("`patterns` must not be empty. Train until the first decision before saving.")
    target = Path(path)
    layers = {
        name: {"block_size": p.block_size, "causal": p.causal, "q_len": p.q_len, "kv_len": p.kv_len}
        for name, p in patterns.items()
    }
    header = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(layers)}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file({name: p.keep.contiguous() for name, p in patterns.items()}, partial, metadata=header)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_patterns(path: str | os.PathLike[str]) -> dict[str, BlockPattern]:
    """Read what `save_patterns` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, or of another version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a pattern file, got {os.fspath(path)!r}, which does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or header.get("version") != str(VERSION):
                raise ValueError(
                    f"`path` must be a {FORMAT} file of version {VERSION}, got format {header.get('format')!r}, "
                    f"version {header.get('version')!r}. Write it with `save_patterns`."
                )
            layers = json.loads(header["layers"])
            return {name: _pattern(file.get_tensor(name), part) for name, part in layers.items()}
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"`path` must be a whole pattern file, got {os.fspath(path)!r}: {error}.") from error


def _pattern(keep: Tensor, part: Mapping[str, Any]) -> BlockPattern:
    return BlockPattern(keep, tuple(part["block_size"]), part["causal"], part["q_len"], part["kv_len"])
