"""Adapts a pattern to one call: to one that shows later keys, as prefixes and images do, or to the last queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune.kernels.derived import derived
from sparse_prune.pattern import BlockPattern, num_blocks


def opened(pattern: BlockPattern) -> BlockPattern:
    """Make a causal pattern of self-attention bidirectional: it keeps every block with a later key for any query.

    The call's mask must hide the later keys that are hidden.
    """

    def make() -> BlockPattern:
        rows, cols = pattern.keep.shape[1:]
        keep = pattern.keep | _later(0, rows, cols, pattern.block_size)
        return BlockPattern(keep, pattern.block_size, False, pattern.q_len, pattern.kv_len)

    return derived(pattern, ("opened",), make)


def last_rows(pattern: BlockPattern, q_len: int, kv_len: int, causal: bool, device: torch.device) -> Tensor:
    """Return the token mask of a sequence's last queries: boolean, (num_heads, q_len, kv_len), True = may attend.

    In a call that is not `causal`, a causal pattern keeps all later keys.
    """
    if causal and pattern.causal:
        return pattern.token_mask(q_len, kv_len, device)
    (block_q, block_kv), start = pattern.block_size, kv_len - q_len
    first, end, cols = start // block_q, num_blocks(kv_len, block_q), num_blocks(kv_len, block_kv)
    keep = pattern.keep_rows(first, end, cols)
    if pattern.causal:
        keep = keep | _later(first, end, cols, pattern.block_size)
    query, key = torch.arange(start, kv_len, device=device), torch.arange(kv_len, device=device)
    mask = keep.to(device)[:, query // block_q - first][:, :, key // block_kv]
    return mask & (key <= query[:, None]) if causal else mask


def _later(first: int, end: int, cols: int, block_size: tuple[int, int]) -> Tensor:
    """Mark the blocks in which some key is later than some query, (end - first, cols)."""
    block_q, block_kv = block_size
    return (torch.arange(cols) + 1) * block_kv - 1 > torch.arange(first, end)[:, None] * block_q
