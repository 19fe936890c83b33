"""Row mass, a query's attention probability in a key block, and the scores that are averages of it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_prune.scores.call import AttentionCall, Per, Tile
from sparse_prune.scores.score import Score, collect
from sparse_prune.scores.statistics import BlockStatistics, Statistic


class Mean(Score):
    """Mean of the row mass in a block, in [0, 1]."""

    statistic: ClassVar[Statistic | None] = "mean"

    def add(self, tile: Tile) -> Tensor:
        """Sum the masses."""
        return tile.mass.sum((0, 2))


class MeanSquare(Score):
    """Mean square of the row mass in a block, in [0, 1]."""

    statistic: ClassVar[Statistic | None] = "mean_square"

    def add(self, tile: Tile) -> Tensor:
        """Sum the squared masses."""
        return tile.mass.square().sum((0, 2))


class Max(Score):
    """Largest row mass in a block, averaged over samples, in [0, 1]: it spares heads that look up single tokens
    (docs/score_statistics.md)."""

    statistic: ClassVar[Statistic | None] = "max"
    per: ClassVar[Per] = "sample"

    def add(self, tile: Tile) -> Tensor:
        """Sum the largest mass of each sample."""
        return tile.mass.amax(2).sum(0)


@torch.no_grad()
def probe_blocks(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
) -> BlockStatistics:
    """Collect row-mass statistics of dense attention, one block of queries at a time.

    Args:
        query: (batch, num_heads, q_len, head_dim), after position encoding.
        key: (batch, num_kv_heads, kv_len, head_dim).
        block_size: Tokens per block side, (query, key).
        causal: Whether query i sees only keys up to i + kv_len - q_len.
        scale: Factor on products; None means head_dim ** -0.5.
        key_mask: Boolean, (batch, kv_len), True = real. Padded positions count neither as keys nor as queries.
        attn_mask: Boolean, broadcastable to (batch, num_heads, q_len, kv_len).
        softcap: Logits become softcap * tanh(logits / softcap).

    Returns:
        Sums and counts; sums are NaN where a query or key is NaN or infinite.
    """
    call = AttentionCall(
        query, key, block_size, causal, scale=scale, key_mask=key_mask, attn_mask=attn_mask, softcap=softcap
    )
    return collect(call, (Mean(), MeanSquare(), Max()), ("row", "sample"))
