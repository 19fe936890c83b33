"""Attention of a long chunk of a sequence, also against what came before: by the pattern's rows that it spans."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels import AttentionOptions, block_sparse_attention, moving_backend
from sparse_prune.pattern import BlockPattern, num_blocks


def spans_rows(pattern: BlockPattern, q_len: int) -> bool:
    """Whether so many queries span rows of a causal pattern, so that a token mask would cost more than the rows do."""
    return pattern.causal and q_len > pattern.block_size[0]


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute attention of the last queries over their kept blocks alone.

    Args:
        query: (batch, num_heads, q_len, head_dim), the last `q_len` of `kv_len` positions.
        key: (batch, num_kv_heads, kv_len, head_dim). Blocks that none of the queries keeps may hold any finite numbers.
        value: (batch, num_kv_heads, kv_len, value_dim), likewise.
        pattern: A causal pattern of any lengths, continued by the rule of `BlockPattern.at`.
        options: Options of the call.

    Returns:
        (batch, num_heads, q_len, value_dim).
    """
    (block_q, block_kv), (q_len, kv_len) = pattern.block_size, (query.shape[2], key.shape[2])
    first, ahead = divmod(kv_len - q_len, block_q)
    keep = pattern.keep_rows(first, num_blocks(kv_len, block_q), num_blocks(kv_len, block_kv))
    rows = BlockPattern(keep, pattern.block_size, True, ahead + q_len, kv_len)
    # The first row of blocks may begin before the chunk: empty queries stand for those that came before.
    query, mask = F.pad(query, (0, 0, ahead, 0)), options.attn_mask
    if mask is not None and mask.shape[2] > 1:
        options = replace(options, attn_mask=F.pad(mask, (0, 0, ahead, 0)))
    backend = moving_backend(query, rows, options)
    return block_sparse_attention(query, key, value, rows, options, backend=backend)[:, :, ahead:]
