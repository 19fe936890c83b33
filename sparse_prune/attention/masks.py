"""Reads SDPA's masks: whether they are causal, add a bias, or hide padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

HIDDEN = -1e4
"""An additive mask hides a key with this value or less, as its softmax is then 0."""


def visible(mask: Tensor) -> Tensor:
    """Convert a boolean or additive mask to a boolean one, True = may attend."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def is_bias(mask: Tensor) -> bool:
    """Whether a mask does more than hide keys, or requires a gradient. Reads its values."""
    return mask.dtype != torch.bool and (mask.requires_grad or bool(((mask != 0) & (mask > HIDDEN)).any()))


_HIDES = WeakTensorKeyDictionary()  # results by mask: the layers of a forward pass share one


def hides_future(mask: Tensor, q_len: int, kv_len: int) -> bool:
    """Whether no query sees a key later than itself. Reads the mask's values, once per tensor.

    Args:
        mask: Boolean or additive, broadcastable to (batch, num_heads, q_len, kv_len).
        q_len: Queries, at the last positions.
        kv_len: Positions.
    """
    if q_len == 1:  # nothing is later than the last query
        return True
    if mask.dim() < 2 or mask.shape[-2:] != (q_len, kv_len):
        return False  # all rows alike, or all keys
    version, hides = _HIDES.get(mask, (None, False))  # type: ignore[no-untyped-call, unused-ignore]
    if version is None or version != _version(mask):
        hides = not bool(visible(mask).triu(1 + kv_len - q_len).any())
        _HIDES[mask] = _version(mask), hides
    return bool(hides)


def assert_hides_future(mask: Tensor, q_len: int, kv_len: int, layer: str) -> None:
    """Assert `hides_future` when a compiled graph runs, as a tracer cannot read the mask.

    On a GPU a failure stops the process's kernels, as every device assertion does.

    Args:
        mask: See `hides_future`, also for the lengths.
        layer: Name of the layer for the error.
    """
    if q_len == 1 or mask.dim() < 2 or mask.shape[-2:] != (q_len, kv_len):
        return
    later = visible(mask).triu(1 + kv_len - q_len).any()
    torch._assert_async(
        ~later,
        f"Layer {layer!r} must get masks that show no later key once it is compiled with a causal pattern, got one "
        "that does. Run the model without torch.compile, or give it an example with such a mask before training.",
    )


def _version(mask: Tensor) -> int | None:
    """The number of writes into a tensor; None in inference mode, which does not count them."""
    return None if mask.is_inference() else mask._version


def split(mask: Tensor | None, batch: int, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Split a mask into those of `AttentionOptions`: one for padding, or one for everything else.

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
