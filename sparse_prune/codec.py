"""The lossless codec of files and checkpoints: masks as bits, numbers without their zeros, and patterns as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_prune.pattern import BlockPattern

Compressed = dict[str, Any]


def compress(tensor: Tensor) -> Compressed:
    """Compress a tensor by leaving out its zeros: half of the numbers under a causal mask, more under a window.

    Args:
        tensor: Booleans or numbers, of any shape.

    Returns:
        The shape, a bit per element (uint8, eight elements a byte) that tells whether it is nonzero, and the nonzero
        numbers in order.
    """
    filled = tensor if tensor.dtype == torch.bool else tensor != 0
    bits = torch.from_numpy(np.packbits(filled.numpy(force=True)))
    compressed: Compressed = {"shape": tuple(tensor.shape), "bits": bits}
    if filled is not tensor:
        compressed["values"] = tensor.flatten().index_select(0, filled.flatten().nonzero()[:, 0]).cpu()
    return compressed


def decompress(compressed: Compressed | Tensor) -> Tensor:
    """Decompress a tensor, on the CPU.

    Args:
        compressed: The result of `compress`, or a whole tensor, as pruning state of version 2 holds it.
    """
    if isinstance(compressed, Tensor):
        return compressed
    bits = np.unpackbits(compressed["bits"].numpy(force=True), count=math.prod(compressed["shape"]))
    filled = torch.from_numpy(bits.view(bool))
    if "values" in compressed:
        values = compressed["values"].cpu()
        filled = torch.zeros(len(filled), dtype=values.dtype).masked_scatter_(filled, values)
    return filled.view(compressed["shape"])


def encode(patterns: Mapping[str, BlockPattern]) -> dict[str, Tensor]:
    """Encode patterns as tensors: checkpoints, pattern files and frames of the history hold the same ones.

    Args:
        patterns: Name -> pattern.

    Returns:
        Two tensors per pattern, on the CPU. `NAME:bits`, uint8, has a bit per block of `keep`, eight blocks a byte.
        `NAME:shape`, int64, (8,), has heads, rows and columns of blocks, tokens per block side (query, key), 1 if
        causal, query tokens and key tokens.
    """
    encoded = {}
    for name, pattern in patterns.items():
        shape = (*pattern.keep.shape, *pattern.block_size, pattern.causal, pattern.q_len, pattern.kv_len)
        encoded[f"{name}:bits"] = compress(pattern.keep)["bits"]
        encoded[f"{name}:shape"] = torch.tensor(shape, dtype=torch.int64)
    return encoded


def decode(encoded: Mapping[str, Tensor]) -> dict[str, BlockPattern]:
    """Decode patterns.

    Args:
        encoded: The result of `encode`, in any order; the patterns come in the order of their shapes.

    Raises:
        KeyError: If a pattern's bits are missing.
        ValueError: If bits and shape do not make a pattern.
    """
    names = [key.removesuffix(":shape") for key in encoded if key.endswith(":shape")]
    return {name: _pattern(encoded[f"{name}:bits"], encoded[f"{name}:shape"].tolist()) for name in names}


def _pattern(bits: Tensor, shape: list[int]) -> BlockPattern:
    heads, rows, cols, block_q, block_kv, causal, q_len, kv_len = shape
    keep = decompress({"shape": (heads, rows, cols), "bits": bits})
    return BlockPattern(keep, (block_q, block_kv), bool(causal), q_len, kv_len)
