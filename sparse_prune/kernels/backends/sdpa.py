"""The SDPA backend: takes the pattern as a boolean mask, skips nothing, and is fastest for dense patterns on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels import reference
from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

_LARGEST_MASK = 2**24
"""Most elements of a token mask, 5 bytes each, that every layer keeps for its backward pass."""


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute as `reference.attend`. Dropout draws from torch's generator and ignores `seed`.

    Raises:
        ValueError: If a soft cap is asked for, which SDPA does not support.
    """
    if options.softcap is not None:
        raise ValueError("Backend 'sdpa' has no `softcap`. Use 'reference', which has.")
    mask = pattern.token_mask(query.shape[2], key.shape[2], query.device)[None]
    visible = options.token_mask(query.shape[2], key.shape[2], query.device)
    mask, group = mask if visible is None else mask & visible, query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return masked_attention(query, key, value, mask, options, dropout_p=options.dropout_p)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions, dropout_p: float = 0.0
) -> Tensor:
    """Compute attention under a boolean mask, with the soft cap and the scale of some options.

    Keys and values have as many heads as the query. The mask is broadcastable to (batch, num_heads, q_len, kv_len),
    True = may attend; None: all may.
    """
    if options.softcap is not None:
        everything = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
        capped = AttentionOptions(scale=options.scale, softcap=options.softcap)
        return reference.masked_attention(query, key, value, everything if mask is None else mask, capped)
    output: Tensor = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=options.scale)
    return output if mask is None else output.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _suits_moving(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> bool:
    """Whether the call is on a CPU that is faster with a token mask over all pairs than with the kept blocks alone.

    The unit of costs is SDPA's time for one query-key pair, forward and backward; they were fitted to measurements of
    `benchmarks/moving_backend.py` on one thread of an Intel Xeon.
    """
    if query.device.type != "cpu" or options.softcap is not None:
        return False
    pairs = query.shape[0] * pattern.num_heads * pattern.q_len * pattern.kv_len
    masks = (options.key_mask, options.attn_mask, options.documents)
    own = any(mask is not None and mask.shape[0] > 1 for mask in masks)  # each sample has its own mask
    elements = pairs if own else pairs // max(query.shape[0], 1)
    if elements > _LARGEST_MASK and not options.dropout_p:  # with dropout SDPA keeps every weight in any case
        return False
    pair, kept_pair = 1.0, 1.0 + 48 / min(pattern.block_size)
    if query.dtype == torch.bfloat16:
        kept_pair *= 1.6
    if options.dropout_p:  # "gather" can recompute its random numbers, which takes longer
        pair, kept_pair = 4.0 * pair, 8.0 * kept_pair
    kept = pattern.kept_blocks / pattern.keep.numel()
    return pair * pairs + 0.55 * elements < kept_pair * kept * pairs


BACKEND = Backend("sdpa", attend, suits_moving=_suits_moving)
