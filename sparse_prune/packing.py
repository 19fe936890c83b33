"""What files and checkpoints hold, small: masks as bits, numbers without their zeros, and patterns made of them.

What is unpacked or decoded is equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_prune.pattern import BlockPattern

Packed = dict[str, Any]


def pack(tensor: Tensor) -> Packed:
    """The least that a tensor follows from: half the numbers, if the future is masked, and fewer inside a window.

    Args:
        tensor: Boolean or numbers, of any shape.

    Returns:
        The shape, a bit per element (uint8, eight elements a byte) that tells whether it is True or not 0, and the
        numbers that are not 0, in order.
    """
    filled = tensor if tensor.dtype == torch.bool else tensor != 0
    packed: Packed = {"shape": tuple(tensor.shape), "bits": torch.from_numpy(np.packbits(filled.numpy(force=True)))}
    if filled is not tensor:
        packed["values"] = tensor.flatten().index_select(0, filled.flatten().nonzero()[:, 0]).cpu()
    return packed


def unpack(packed: Packed | Tensor) -> Tensor:
    """The tensor that `pack` took, on the CPU.

    Args:
        packed: What `pack` returned, or a whole tensor, as pruning state of version 2 holds it.
    """
    if isinstance(packed, Tensor):
        return packed
    bits = np.unpackbits(packed["bits"].numpy(force=True), count=math.prod(packed["shape"]))
    filled = torch.from_numpy(bits.view(bool))
    if "values" in packed:
        values = packed["values"].cpu()
        filled = torch.zeros(len(filled), dtype=values.dtype).masked_scatter_(filled, values)
    return filled.view(packed["shape"])


def encode(patterns: Mapping[str, BlockPattern]) -> dict[str, Tensor]:
    """Patterns as tensors: checkpoints, pattern files and frames of the history hold the same ones.

    Args:
        patterns: Name -> pattern.

    Returns:
        Two tensors a pattern, on the CPU. `NAME:bits`, uint8, has a bit per block of `keep`, eight blocks a byte.
        `NAME:shape`, int64, (8,), has heads, rows and columns of blocks, tokens per block side (query, key), 1 if
        causal, query tokens and key tokens.
    """
    encoded = {}
    for name, pattern in patterns.items():
        shape = (*pattern.keep.shape, *pattern.block_size, pattern.causal, pattern.q_len, pattern.kv_len)
        encoded[f"{name}:bits"] = pack(pattern.keep)["bits"]
        encoded[f"{name}:shape"] = torch.tensor(shape, dtype=torch.int64)
    return encoded


def decode(encoded: Mapping[str, Tensor]) -> dict[str, BlockPattern]:
    """The patterns that `encode` took.

    Args:
        encoded: What `encode` returned, in any order; the patterns come in the order of their shapes.

    Raises:
        KeyError: If a pattern's bits are missing.
        ValueError: If bits and shape do not make a pattern.
    """
    names = [key.removesuffix(":shape") for key in encoded if key.endswith(":shape")]
    return {name: _pattern(encoded[f"{name}:bits"], encoded[f"{name}:shape"].tolist()) for name in names}


def _pattern(bits: Tensor, shape: list[int]) -> BlockPattern:
    heads, rows, cols, block_q, block_kv, causal, q_len, kv_len = shape
    keep = unpack({"shape": (heads, rows, cols), "bits": bits})
    return BlockPattern(keep, (block_q, block_kv), bool(causal), q_len, kv_len)
