"""Attention of a long chunk of a sequence, also against what came before: by the pattern's rows that it spans."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels import AttentionOptions, block_sparse_attention, moving_backend
from sparse_prune.kernels.derived import of_tensor
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
    query, options = F.pad(query, (0, 0, ahead, 0)), _without_causality(options, len(query), q_len, kv_len)
    mask = options.attn_mask
    if mask is not None and mask.shape[2] > 1:
        options = replace(options, attn_mask=F.pad(mask, (0, 0, ahead, 0)))
    backend = moving_backend(query, rows, options)
    return block_sparse_attention(query, key, value, rows, options, backend=backend)[:, :, ahead:]


def _without_causality(options: AttentionOptions, batch: int, q_len: int, kv_len: int) -> AttentionOptions:
    """Say by `key_mask` what a mask over all pairs hides beside later keys, if it hides the same keys from all queries.

    transformers gives such a mask to every call with more keys than queries.
    """
    mask = options.attn_mask
    if mask is None or mask.shape[1:] != (1, q_len, kv_len):
        return options
    alone, keys = of_tensor(mask, "keys", lambda: _keys_of(mask))
    if not alone:
        return options
    known = [part for part in (options.key_mask, None if keys is None else keys.expand(batch, -1)) if part is not None]
    return replace(options, attn_mask=None, key_mask=torch.stack(known).all(0) if known else None)


def _keys_of(mask: Tensor) -> tuple[bool, Tensor | None]:
    """Tell whether a mask hides the same keys from all queries, beside later ones; and which it shows; None: all."""
    keys, (q_len, kv_len) = mask[:, 0, -1], mask.shape[2:]
    earlier = torch.ones(q_len, kv_len, dtype=torch.bool, device=mask.device).tril(kv_len - q_len)
    if not torch.equal(mask[:, 0], keys[:, None] & earlier):
        return False, None
    return True, None if bool(keys.all()) else keys.clone()
