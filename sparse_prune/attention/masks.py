"""Reads SDPA's masks: whether they are causal, add a bias, or hide padding."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune.kernels.derived import of_tensor

HIDDEN = -1e4
"""An additive mask hides a key with this value or less, as its softmax is then 0."""


def visible(mask: Tensor) -> Tensor:
    """Convert a boolean or additive mask to a boolean one, True = may attend."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def is_bias(mask: Tensor) -> bool:
    """Whether a mask does more than hide keys, or requires a gradient. Reads its values."""
    return mask.dtype != torch.bool and (mask.requires_grad or bool(((mask != 0) & (mask > HIDDEN)).any()))


def hides_future(mask: Tensor, q_len: int, kv_len: int) -> bool:
    """Whether no query, which are the last of `kv_len` positions, sees a key later than itself.

    Reads the mask's values, once per tensor: boolean or additive, broadcastable to (batch, num_heads, q_len, kv_len).
    """
    if q_len == 1:  # nothing is later than the last query
        return True
    if mask.dim() < 2 or mask.shape[-2:] != (q_len, kv_len):
        return False  # all rows alike, or all keys
    return of_tensor(mask, "hides_future", lambda: not bool(visible(mask).triu(1 + kv_len - q_len).any()))


def assert_hides_future(mask: Tensor, q_len: int, kv_len: int, layer: str) -> None:
    """Assert `hides_future` when a compiled graph runs, as a tracer cannot read the mask.

    On a GPU a failure stops the process's kernels, as every device assertion does.
    """
    if q_len == 1 or mask.dim() < 2 or mask.shape[-2:] != (q_len, kv_len):
        return
    later = visible(mask).triu(1 + kv_len - q_len).any()
    torch._assert_async(
        ~later,
        f"Layer {layer!r} must get masks that show no later key once it is compiled with a causal pattern, got one "
        "that does. Run the model without torch.compile, or give it an example with such a mask before training.",
    )


def split(mask: Tensor | None, batch: int, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Convert a mask to `key_mask`, (batch, kv_len), if it hides the same keys from all, else to `attn_mask`, 4D."""
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    same_for_all = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
    if same_for_all:
        return visible(mask[:, 0, 0]).expand(batch, kv_len), None
    return None, visible(mask)
