"""Masks as SDPA takes them, as pruning needs them: which keys are hidden, from whom."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e4
"""A float mask hides a key with this or less; in softmax nothing is left of it."""


def visible(mask: Tensor) -> Tensor:
    """A boolean mask, True = may attend, from a boolean or an additive one."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def is_bias(mask: Tensor) -> bool:
    """Whether a mask does more than hide keys, or learns to. Reads its values."""
    return mask.dtype != torch.bool and (mask.requires_grad or bool(((mask != 0) & (mask > HIDDEN)).any()))


def hides_future(mask: Tensor) -> bool:
    """Whether no query of a square mask, (..., length, length), sees a later key. Reads its values."""
    square = mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2] > 1
    return square and not bool(visible(mask).triu(1).any())


def split(mask: Tensor | None, batch: int, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask as `AttentionOptions` has it: padding of keys apart from everything else.

    Args:
        mask: Boolean or additive, broadcastable to (batch, num_heads, q_len, kv_len).
        batch: Samples.
        kv_len: Keys.

    Returns:
        `key_mask`, (batch, kv_len), and `attn_mask`, four dimensions; at most one of them is given.
    """
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    same_for_all = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
    if same_for_all:
        return visible(mask[:, 0, 0]).expand(batch, kv_len), None
    return None, visible(mask)
