"""Masks between transformers, which makes one per forward pass, and the attention function that its layers call.

What is padding alone, or padding and a causal sliding window, stays small on the way: nobody needs it for all pairs of
tokens before a dense layer asks for it.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_prune.attention.masks import is_bias, visible

_MADE = WeakTensorKeyDictionary()  # masks of `make_mask` -> their width


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    whole: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a call; None hides nothing beside what causality does.

    (batch, kv_len) if it is padding alone; (batch, 1, window, kv_len), padding repeated, if it is padding and a causal
    sliding window shorter than the sequence (`window_of`); else (batch, 1, q_len, kv_len). transformers may call again
    with the result: masks of four dimensions it takes as they are.

    Masks cover the keys from the first one to the latest. From their width the attention function knows how many keys
    of a static cache count, and how many a cache with a window has dropped.

    With `whole` causality is not left to the layers: masks are those of eager attention, and None hides nothing at all.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    mask_function = causal_mask_function if mask_function is None else mask_function
    # Who wants all of a causal mask may go on to change it.
    bidirectional = mask_function is bidirectional_mask_function
    # Gemma 4 takes rows out of it for layers that use the keys of others.
    sliced = bool(getattr(kwargs.get("config"), "num_kv_shared_layers", 0))
    small = not whole and not sliced and (bidirectional or kwargs.get("allow_is_causal_skip", True))
    window = _window(mask_function, kwargs.get("local_size")) if small else None
    room = _room(q_length, kv_length, int(q_offset), kv_offset, mask_function)
    if room or kv_offset or whole or sliced:
        kwargs["allow_is_causal_skip"] = False
    sizes = batch_size, q_length, kv_offset + kv_length - room, q_offset
    mask = _mask(*sizes, mask_function, attention_mask, window, small, **kwargs)
    if whole and mask is not None:
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if mask is None and room:
        mask = torch.ones(batch_size, sizes[2], dtype=torch.bool, device=kwargs.get("device"))
    if mask is not None and not torch.compiler.is_compiling():
        _MADE[_root(mask)] = mask.shape[-1]  # type: ignore[no-untyped-call, unused-ignore]
    return mask


def _room(q_length: int, kv_length: int, q_offset: int, kv_offset: int, mask_function: Any) -> int:
    """Places of a static cache that wait for keys after the last query."""
    from transformers.masking_utils import bidirectional_mask_function

    end = q_offset + q_length
    room = kv_offset + kv_length - end
    # Cross-attention may have more keys than queries too, but its queries see them.
    if room <= 0 or mask_function is bidirectional_mask_function:
        return 0
    return 0 if mask_function(*torch.tensor([0, 0, end - 1, end])) else room


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    window: int | None,
    small: bool,
    **kwargs: Any,
) -> Tensor | None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if small and (plain or (window and not q_offset)) and q_length == kv_length:
        padding = None if attention_mask is None else attention_mask[:, :kv_length].bool()
        # A tracer cannot look into the mask: it takes padding that hides nothing along.
        if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
        if window and window < kv_length:
            if padding is None:
                padding = torch.ones((), dtype=torch.bool, device=kwargs.get("device")).expand(batch_size, kv_length)
            if padding.shape == (batch_size, kv_length):
                return padding[:, None, None].expand(-1, 1, window, -1)
        elif padding is None or padding.shape[1] == kv_length:
            return padding
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, 0, mask_function, attention_mask, **kwargs
    )
    return mask


def _window(mask_function: Any, size: int | None) -> int | None:
    """Tokens that a query sees back to, itself included, if the mask is that window and causality and nothing else."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    # Of one row a mask could be meant for all queries; and a tracer cannot compare functions.
    if not isinstance(size, int) or size < 2 or torch.compiler.is_compiling():
        return None
    return size if _alike(mask_function, sliding_window_causal_mask_function(size)) else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two functions have the same code and hold functions and numbers that are alike."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        held, other_held = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other))
        return one.__code__ is other.__code__ and _alike(tuple(held), tuple(other_held))
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, int) and isinstance(other, int) and one == other


def window_of(mask: Tensor | None, q_len: int) -> int | None:
    """The window of a mask that stands for one: its rows are fewer than the queries, which no other mask's are."""
    rows = 1 if mask is None or mask.dim() < 4 else mask.shape[2]
    return rows if 1 < rows < q_len else None


def may_lack_keys(mask: Tensor | None, q_len: int, kv_len: int, window: int | None) -> bool:
    """Whether a cache may have dropped keys of a sequence before its last `kv_len`.

    The width of a mask of `make_mask` tells, also where a model took a part of the mask. Others may cover the keys that
    are left, as many as a window leaves.
    """
    if q_len == kv_len:
        return False
    made = None if mask is None else _MADE.get(_root(mask))  # type: ignore[no-untyped-call, unused-ignore]
    if made is not None:
        return bool(made > kv_len)
    return (mask is not None and mask.shape[-1] > kv_len) or (window is not None and kv_len == window - 1 + q_len)


def _root(mask: Tensor) -> Tensor:
    return mask if mask._base is None else mask._base


_BOOLEAN = WeakTensorKeyDictionary()  # by the mask of a forward pass, which all its layers get


def boolean(mask: Tensor) -> Tensor:
    """A mask of zeros and what hides keys as a boolean one, looked at once per forward pass; others as they are."""
    if mask.dtype == torch.bool:
        return mask
    if torch.compiler.is_compiling():
        found = _if_it_only_hides(mask)
    else:
        if mask not in _BOOLEAN:
            _BOOLEAN[mask] = _if_it_only_hides(mask)
        found = _BOOLEAN[mask]
    return mask if found is None else found


def _if_it_only_hides(mask: Tensor) -> Tensor | None:
    return None if is_bias(mask) else visible(mask)


_EXPANDED = WeakTensorKeyDictionary()  # likewise


def expand(mask: Tensor, causal: bool) -> Tensor:
    """The (batch, 1, length, length) mask that transformers makes for SDPA of padding, or of padding and a window."""
    known = _EXPANDED.setdefault(mask, {})  # type: ignore[no-untyped-call, unused-ignore]
    if causal not in known:
        length, window = mask.shape[-1], mask.shape[2] if mask.dim() == 4 else None
        keys = mask[:, None, None] if window is None else mask[:, :, :1]
        square = torch.ones(length, length, dtype=torch.bool, device=mask.device)
        if window is not None:
            square = square.tril().triu(1 - window)
        elif causal:
            square = square.tril()
        known[causal] = keys & square
    expanded: Tensor = known[causal]
    return expanded
