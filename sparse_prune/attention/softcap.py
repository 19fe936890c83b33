"""Dense attention with a soft cap, which SDPA lacks."""

from __future__ import annotations

from torch import Tensor

from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from sparse_prune.pattern import BlockPattern


def softcapped(query: Tensor, key: Tensor, value: Tensor, causal: bool, options: AttentionOptions) -> Tensor:
    """Compute dense attention with a soft cap; shapes as in `block_sparse_attention`.

    An attention mask among the options already holds causality.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    pattern = BlockPattern.dense(query.shape[1], q_len, kv_len, max(q_len, kv_len), causal)
    return block_sparse_attention(query, key, value, pattern, options, backend="reference")
