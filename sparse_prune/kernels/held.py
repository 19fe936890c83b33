"""Where a cache that evicts holds its key blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeldBlocks:
    """Places of key blocks in a tensor that holds those of all heads, block beside block."""

    place: Tensor
    """The block's place among all, int64, (num_kv_heads, kv_blocks), on the CPU; -1: evicted."""
