"""Pattern-masked attention in plain torch operations, the reference for every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune.kernels.dropout import dropout_uniform
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute masked softmax attention with all weights materialised, in any float dtype, differentiably.

    Rows that may attend to nothing give zeros and zero gradients.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        key: (batch, num_kv_heads, kv_len, head_dim); num_kv_heads divides num_heads.
        value: (batch, num_kv_heads, kv_len, value_dim).
        pattern: The connections to keep, of these lengths.
        options: Masks, scale, dropout, soft cap.

    Returns:
        (batch, num_heads, q_len, value_dim).
    """
    mask = pattern.token_mask(query.shape[2], key.shape[2], query.device)[None]
    return masked_attention(query, key, value, mask, options)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Compute as `attend`, by a boolean mask broadcastable to (batch, num_heads, q_len, kv_len), True = may attend."""
    batch, heads, q_len, head_dim = query.shape
    kv_len, group = key.shape[2], heads // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-1, -2) * (max(head_dim, 1) ** -0.5 if options.scale is None else options.scale)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    visible = options.token_mask(q_len, kv_len, query.device)
    if visible is not None:
        mask = mask & visible
    logits = logits.masked_fill(~mask, float("-inf"))
    # A row without a key would be softmax(-inf, ...) = NaN, in the backward pass too.
    logits = logits.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    weights = torch.softmax(logits, -1) * mask
    if options.dropout_p:
        assert options.seed is not None
        uniform = dropout_uniform(
            options.seed,
            torch.arange(batch * heads, device=query.device).view(batch, heads, 1, 1),
            torch.arange(q_len, device=query.device).view(1, 1, q_len, 1),
            torch.arange(kv_len, device=query.device),
        )
        weights = weights * (uniform >= options.dropout_p) / (1.0 - options.dropout_p)
    return weights @ value
