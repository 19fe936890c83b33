"""Patterns on disk: a safetensors file with a versioned, checked header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_prune.codec import decode, encode
from sparse_prune.files import whole_file
from sparse_prune.pattern import BlockPattern, total_sparsity

PATTERN_FILE = "attention_pattern.safetensors"
"""Name of the file that holds the patterns, beside the model's own files."""
FORMAT = "sparse_prune.patterns"
VERSION = "3"
RULE = "learned corner; then sinks, band by distance from the diagonal, dense heads"
"""How patterns go on at other lengths: `BlockPattern.at`. A file that was made for another rule is refused."""
_READABLE = ("2", VERSION)  # version 2 held masks as they are, a byte per block
_UNUSED = "unused/"
"""Begins the tensor names of patterns that no layer uses."""


def save_patterns(
    patterns: Mapping[str, BlockPattern],
    path: str | os.PathLike[str],
    details: Mapping[str, Any] | None = None,
    unused: Mapping[str, BlockPattern] | None = None,
) -> Path:
    """Write patterns to a file, which is whole or not there at any time.

    Args:
        patterns: Layer -> pattern.
        path: The file.
        details: What else the header tells, as JSON types: see `describe_pruning`.
        unused: Layer -> pattern that it learned and does not use, because it was no faster where it was trained.

    Raises:
        ValueError: If there are no patterns.
    """
    if not patterns:
        raise ValueError("`patterns` must not be empty. Train until the first decision before saving.")
    target = Path(path)
    header = {
        "layers": {name: _describe(pattern) for name, pattern in patterns.items()},
        "rule": RULE,
        "sparsity": total_sparsity(patterns.values()),
        **({"unused": {name: _describe(pattern) for name, pattern in unused.items()}} if unused else {}),
        **(details or {}),
    }
    tensors = encode({**patterns, **{_UNUSED + name: pattern for name, pattern in (unused or {}).items()}})
    text = json.dumps(header)
    metadata = {"format": FORMAT, "version": VERSION, "header": text, "sha256": _checksum(text, tensors)}
    try:
        with whole_file(target) as file:
            save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"{target} could not be written: {error}") from error
    return target


def load_patterns(path: str | os.PathLike[str], unused: bool = False) -> dict[str, BlockPattern]:
    """Read the patterns that `save_patterns` wrote.

    Args:
        path: The file.
        unused: Whether layers that were reverted to dense attention get the patterns that they had learned before:
            another machine may gain by them. Since then these layers have trained with all connections.

    Returns:
        Layer -> pattern.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file, of another version or rule, cut short or altered.
    """
    patterns, learned, _ = _read(path)
    return {**patterns, **learned} if unused else patterns


def read_pattern_file(path: str | os.PathLike[str]) -> tuple[dict[str, BlockPattern], dict[str, Any]]:
    """Read what `save_patterns` wrote: patterns and header. Nothing in the file is executed.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `load_patterns`.
    """
    patterns, _, header = _read(path)
    return patterns, header


def _read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, BlockPattern], dict[str, BlockPattern], dict[str, Any]]:
    """Read patterns in force, unused ones, and the header."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a pattern file, got {os.fspath(path)!r}, which does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"`path` must be a whole pattern file, got {os.fspath(path)!r}: {error}. Copy it again."
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") not in _READABLE:
        raise ValueError(
            f"`path` must be a {FORMAT} file of version {' or '.join(_READABLE)}, got format "
            f"{metadata.get('format')!r}, version {metadata.get('version')!r}. Write it with `save_patterns`."
        )
    if metadata.get("sha256") != _checksum(metadata.get("header", ""), tensors):
        raise ValueError(
            f"`path` must be a pattern file as it was written, got {os.fspath(path)!r}, which was altered. "
            "Copy it again."
        )
    try:
        header = json.loads(metadata["header"])
        if header["rule"] != RULE:
            raise ValueError(f"rule for other lengths {header['rule']!r} instead of {RULE!r}")
        found = decode(tensors) if metadata["version"] == VERSION else _decode_version_2(tensors, header)
        patterns = {name: found[name] for name in header["layers"]}
        unused = {name: found[_UNUSED + name] for name in header.get("unused", {})}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`path` must be a pattern file of this library, got {os.fspath(path)!r}: {error}. "
            "Write it with `save_patterns`."
        ) from error
    return patterns, unused, header


def _describe(pattern: BlockPattern) -> dict[str, Any]:
    return {
        "num_heads": pattern.num_heads,
        "block_size": list(pattern.block_size),
        "causal": pattern.causal,
        "q_len": pattern.q_len,
        "kv_len": pattern.kv_len,
        "sparsity": pattern.sparsity,
    }


def _decode_version_2(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, BlockPattern]:
    parts = {**header["layers"], **{_UNUSED + name: part for name, part in header.get("unused", {}).items()}}
    return {
        name: BlockPattern(tensors[name], tuple(part["block_size"]), part["causal"], part["q_len"], part["kv_len"])
        for name, part in parts.items()
    }


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of the header's text and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
