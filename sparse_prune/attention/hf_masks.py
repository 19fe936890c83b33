"""Reads the masks that `make_mask` makes once per forward pass, in the attention function of every layer.

Masks with one value per token stay small until a dense layer needs them over all pairs of tokens: which tokens are real
(boolean), or the number of a token's document in packed sequences (integers), with a causal sliding window or without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_prune.attention.masks import is_bias, visible
from sparse_prune.kernels import documents_from_cu_seqlens
from sparse_prune.kernels.derived import of_tensor

_MADE = WeakTensorKeyDictionary()  # masks of `make_mask` -> their width


def note_width(mask: Tensor) -> None:
    """Remember the width of a mask that was made, which `dropped_keys` needs even if the model cuts the mask."""
    _MADE[_root(mask)] = mask.shape[-1]  # type: ignore[no-untyped-call, unused-ignore]


def repeated(tokens: Tensor, window: int) -> Tensor:
    """Repeat values per token, (batch, length), to (batch, 1, window, length), which adds a causal sliding window."""
    return tokens[:, None, None].expand(-1, 1, window, -1)


def window_of(mask: Tensor | None, q_len: int) -> int | None:
    """Return the window of a mask made by `repeated`, the only kind with fewer rows than queries; else None."""
    rows = 1 if mask is None or mask.dim() < 4 else mask.shape[2]
    return rows if 1 < rows < q_len else None


def tokens_of(mask: Tensor | None, q_len: int) -> Tensor | None:
    """Return the values per token of a mask of `make_mask`, (batch, kv_len); None if it has none."""
    if mask is None or mask.dim() == 2:
        return mask
    if window_of(mask, q_len) is None or shows_all(mask, q_len):
        return None
    return of_tensor(mask, "tokens", lambda: mask[:, 0, 0])


def shows_all(mask: Tensor | None, q_len: int) -> bool:
    """Whether a mask hides nothing but later keys and those outside a window."""
    return mask is None or (window_of(mask, q_len) is not None and not mask.stride(3))


def tells_documents(mask: Tensor | None) -> bool:
    """Whether a mask of `make_mask` holds the documents of packed sequences."""
    return mask is not None and mask.dtype == torch.int32


def keep_apart(mask: Tensor | None, cu_seqlens: Tensor, batch: int, length: int, causal: bool) -> Tensor | None:
    """Add to a mask the documents that FlashAttention's arguments tell, unless it holds documents or adds a bias.

    Args:
        mask: A mask of `make_mask`, or None.
        cu_seqlens: Integers, (documents + 1,), ascending from 0 to batch * length: rows follow each other.
        batch: Number of rows.
        length: Tokens of a row.
        causal: Whether the call is causal, if the mask does not tell.
    """
    if tells_documents(mask) or (mask is not None and mask.dtype != torch.bool):
        return mask
    documents = of_tensor(
        cu_seqlens,
        (batch, length),
        lambda: documents_from_cu_seqlens(cu_seqlens, batch * length).view(batch, length),
    )
    if mask is None:
        return documents
    window = window_of(mask, length)
    if window is not None and shows_all(mask, length):
        return of_tensor(cu_seqlens, (batch, length, window), lambda: repeated(documents, window))
    if mask.dim() == 2 or window is not None:
        mask = expand(mask, causal)
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])


def newest(mask: Tensor | None, kv_len: int) -> Tensor | None:
    """Cut the keys that a cache with a window has dropped off a mask."""
    return mask if mask is None or mask.shape[-1] <= kv_len else mask[..., -kv_len:]


def dropped_keys(mask: Tensor | None, q_len: int, kv_len: int, window: int | None) -> int | None:
    """Return how many keys a cache has dropped before the last `kv_len` of the sequence, if no query sees them.

    None: this cannot be told, or a query sees them. A mask of `make_mask` tells it, even if the model cut the mask. Any
    other mask may cover only the remaining keys, as many as a window leaves.
    """
    if q_len == kv_len:
        return 0
    whole = None if mask is None else _root(mask)
    made: int | None = None if whole is None else _MADE.get(whole)  # type: ignore[no-untyped-call, unused-ignore]
    if whole is not None and made is not None:
        dropped = max(0, made - kv_len)
        shows = dropped and of_tensor(whole, ("shows", dropped), lambda: bool(whole[..., :dropped].any()))
        return None if shows else dropped
    unknown = (mask is not None and mask.shape[-1] > kv_len) or (window is not None and kv_len == window - 1 + q_len)
    return None if unknown else 0


def _root(mask: Tensor) -> Tensor:
    return mask if mask._base is None else mask._base


def boolean(mask: Tensor) -> Tensor:
    """Convert an additive mask that only hides keys to a boolean one, once per forward pass; others stay."""
    if mask.dtype == torch.bool or tells_documents(mask):
        return mask
    hides = of_tensor(mask, "boolean", lambda: None if is_bias(mask) else visible(mask))
    return mask if hides is None else hides


def expand(mask: Tensor, causal: bool) -> Tensor:
    """Expand a mask with one value per token, with a window or without, to (batch, 1, length, length) for SDPA."""
    return of_tensor(mask, ("expanded", causal), lambda: _expanded(mask, causal))


def _expanded(mask: Tensor, causal: bool) -> Tensor:
    length, window = mask.shape[-1], mask.shape[2] if mask.dim() == 4 else None
    keys = mask[:, None, None] if window is None else mask[:, :, :1]
    if tells_documents(mask):
        keys = keys == keys.transpose(2, 3)
    square = torch.ones(length, length, dtype=torch.bool, device=mask.device)
    if window is not None:
        square = square.tril().triu(1 - window)
    elif causal:
        square = square.tril()
    return keys & square
