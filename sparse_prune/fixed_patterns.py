"""Random patterns, to measure time with."""

from __future__ import annotations

import torch

from sparse_prune.pattern import BlockPattern
from sparse_prune.ranges import check_range


def random_pattern(
    num_heads: int,
    length: int,
    block_size: int | tuple[int, int],
    *,
    density: float,
    causal: bool = True,
    seed: int = 0,
) -> BlockPattern:
    """Make a pattern to measure time with: the first key block, the diagonal, and random others.

    Args:
        num_heads: Query heads; they differ in what they keep, and in how much.
        length: Tokens.
        block_size: Tokens per block, (query, key); one number for both sides.
        density: Share of the possible blocks of all heads to keep, in [0, 1]. Sink and diagonal are kept in any case,
            which may be more than a low density allows.
        causal: Whether queries see only keys up to themselves.
        seed: Seed of the random blocks.

    Raises:
        ValueError: If `density` is out of range.
    """
    check_range("[0, 1]", density=density)
    dense = BlockPattern.dense(num_heads, length, length, block_size, causal)
    block_q, block_kv = dense.block_size
    rows = torch.arange(dense.keep.shape[1])
    order = torch.rand(dense.keep.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    order[:, :, 0] = 2.0
    order[:, rows, rows * block_q // block_kv] = 2.0
    order = order.masked_fill(~dense.keep, -1.0)
    count = max(1, round(density * dense.possible_count))
    cut = order.flatten().topk(count).values[-1]
    return BlockPattern(dense.keep & (order >= cut), dense.block_size, causal, length, length)
