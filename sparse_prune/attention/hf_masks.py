"""Masks between transformers, which makes one per forward pass, and the attention function that its layers call.

What says one thing of every token stays small on the way, as nobody needs it for all pairs of tokens before a dense
layer asks for it: which tokens are padding (boolean), or which of the documents that were packed into a row a token
belongs to (integers), either with a causal sliding window or without.
"""

from __future__ import annotations

from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_prune.attention.masks import is_bias, visible
from sparse_prune.kernels import documents_from_cu_seqlens

_MADE = WeakTensorKeyDictionary()  # masks of `make_mask` -> their width
_LARGE = object()  # no mask: one over all pairs is needed


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

    (batch, kv_len) if it says one thing of every token; (batch, 1, window, kv_len), that repeated, if there is a causal
    sliding window shorter than the sequence too (`window_of`); else (batch, 1, q_len, kv_len). transformers may call
    again with the result: masks of four dimensions it takes as they are.

    Masks cover the keys from the first one to the latest. From their width the attention function knows how many keys
    of a static cache count, and how many a cache with a window has dropped.

    With `whole` causality is not left to the layers: masks are those of eager attention, and None hides nothing at all.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    # Who wants all of a causal mask may go on to change it.
    bidirectional = mask_function is bidirectional_mask_function
    # Gemma 4 takes rows out of it for layers that use the keys of others.
    sliced = bool(getattr(kwargs.get("config"), "num_kv_shared_layers", 0))
    each, documents = _of_documents(mask_function)
    unchanged = bidirectional or documents is not None or kwargs.get("allow_is_causal_skip", True)
    small = unchanged and not whole and not sliced
    window = _window(each, kwargs.get("local_size")) if small else None
    room = _room(q_length, kv_length, int(q_offset), kv_offset, mask_function)
    if room or kv_offset or whole or sliced:
        kwargs["allow_is_causal_skip"] = False
    sizes = batch_size, q_length, kv_offset + kv_length - room, q_offset
    mask: Any = _small_mask(*sizes, each, attention_mask, documents, window, kwargs.get("device")) if small else _LARGE
    if mask is _LARGE:
        mask = sdpa_mask(*sizes, 0, mask_function, attention_mask, **kwargs)
    if whole and mask is not None:
        dtype = kwargs.get("dtype", torch.float32)
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if mask is None and room:
        mask = torch.ones(batch_size, sizes[2], dtype=torch.bool, device=kwargs.get("device"))
    if mask is not None and not torch.compiler.is_compiling():
        _MADE[_root(mask)] = mask.shape[-1]  # type: ignore[no-untyped-call, unused-ignore]
    made: Tensor | None = mask
    return made


def _room(q_length: int, kv_length: int, q_offset: int, kv_offset: int, mask_function: Any) -> int:
    """Places of a static cache that wait for keys after the last query."""
    from transformers.masking_utils import bidirectional_mask_function

    end = q_offset + q_length
    room = kv_offset + kv_length - end
    # Cross-attention may have more keys than queries too, but its queries see them.
    if room <= 0 or mask_function is bidirectional_mask_function:
        return 0
    return 0 if mask_function(*torch.tensor([0, 0, end - 1, end])) else room


def _small_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    device: Any,
) -> Any:
    """What says one thing of every token, as `make_mask` returns it; `_LARGE` if the mask says more than that."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if q_length != kv_length or not (plain or (window and not q_offset)):
        return _LARGE
    tokens = documents
    if tokens is None and attention_mask is not None:
        tokens = attention_mask[:, :kv_length].bool()
        # A tracer cannot look into the mask: it takes padding that hides nothing along.
        if not torch.compiler.is_compiling() and bool(tokens.all()):
            tokens = None
    if window and window < kv_length:
        if tokens is None:
            tokens = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_length)
        return repeated(tokens, window) if tokens.shape == (batch_size, kv_length) else _LARGE
    return tokens if tokens is None or tokens.shape[1] == kv_length else _LARGE


def _of_documents(mask_function: Any) -> tuple[Any, Tensor | None]:
    """The mask function of each document, and the document of each token, int32, (batch, length), of packed sequences.

    Else the mask function as it is, and None. Inside of a document positions run on, so that places may stand for them.
    """
    from transformers.masking_utils import packed_sequence_mask_function, remap_positions_for_packed_sequence

    if torch.compiler.is_compiling():  # a tracer cannot compare functions
        return mask_function, None
    parts = _held(mask_function).get("mask_functions", ())
    makers = packed_sequence_mask_function(torch.empty(0)), remap_positions_for_packed_sequence(None, torch.empty(0))
    if [getattr(part, "__code__", None) for part in parts] != [maker.__code__ for maker in makers]:
        return mask_function, None
    return _held(parts[1])["mask_function"], _held(parts[0])["packed_sequence_mask"].int()


def _held(function: Any) -> dict[str, Any]:
    """What a function has of those around it, by name."""
    return dict(getclosurevars(function).nonlocals) if isinstance(function, FunctionType) else {}


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


def repeated(tokens: Tensor, window: int) -> Tensor:
    """What is said of tokens, (batch, length), with a causal sliding window: (batch, 1, window, length)."""
    return tokens[:, None, None].expand(-1, 1, window, -1)


def window_of(mask: Tensor | None, q_len: int) -> int | None:
    """The window of a mask that stands for one: its rows are fewer than the queries, which no other mask's are."""
    rows = 1 if mask is None or mask.dim() < 4 else mask.shape[2]
    return rows if 1 < rows < q_len else None


def tokens_of(mask: Tensor | None, q_len: int) -> Tensor | None:
    """What a mask of `make_mask` says of every token, (batch, kv_len); None: nothing, or something of every pair."""
    if mask is None or mask.dim() == 2:
        return mask
    if window_of(mask, q_len) is None or shows_all(mask, q_len):
        return None
    known = _made_of(mask)
    if "tokens" not in known:
        known["tokens"] = mask[:, 0, 0]
    return known["tokens"]


def shows_all(mask: Tensor | None, q_len: int) -> bool:
    """Whether a mask hides nothing but what is later, or outside of a window."""
    return mask is None or (window_of(mask, q_len) is not None and not mask.stride(3))


def tells_documents(mask: Tensor | None) -> bool:
    """Whether a mask of `make_mask` tells the documents of packed sequences."""
    return mask is not None and mask.dtype == torch.int32


def keep_apart(mask: Tensor | None, cu_seqlens: Tensor, batch: int, length: int, causal: bool) -> Tensor | None:
    """The mask with documents as FlashAttention is told of them, where it does not tell them yet.

    Args:
        mask: Of `make_mask`, or boolean; one that adds a bias stays as it is.
        cu_seqlens: Integers, (documents + 1,), ascending from 0 to batch * length: rows follow each other.
        batch: Samples.
        length: Tokens of a sample.
        causal: Whether the call is, where the mask does not say so.
    """
    if tells_documents(mask) or (mask is not None and mask.dtype != torch.bool):
        return mask
    known = _made_of(cu_seqlens)
    if (batch, length) not in known:
        known[batch, length] = documents_from_cu_seqlens(cu_seqlens, batch * length).view(batch, length)
    documents = known[batch, length]
    if mask is None:
        return documents
    window = window_of(mask, length)
    if window is not None and shows_all(mask, length):
        if window not in known:
            known[window] = repeated(documents, window)
        return known[window]
    if mask.dim() == 2 or window is not None:
        mask = expand(mask, causal)
    return mask & (documents[:, None, :, None] == documents[:, None, None, :])


def newest(mask: Tensor | None, kv_len: int) -> Tensor | None:
    """A mask without the keys that a cache with a window has dropped."""
    return mask if mask is None or mask.shape[-1] <= kv_len else mask[..., -kv_len:]


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
    if mask.dtype == torch.bool or tells_documents(mask):
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


_SMALL = WeakTensorKeyDictionary()  # by the small mask, or the lengths, of a forward pass


def _made_of(small: Tensor) -> dict[Any, Tensor]:
    """What the layers of a forward pass have made of it."""
    made: dict[Any, Tensor] = {}
    return made if torch.compiler.is_compiling() else _SMALL.setdefault(small, made)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def expand(mask: Tensor, causal: bool) -> Tensor:
    """The (batch, 1, length, length) mask that transformers makes for SDPA of what is said of tokens, with a window or
    without."""
    known = _made_of(mask)
    if causal not in known:
        length, window = mask.shape[-1], mask.shape[2] if mask.dim() == 4 else None
        keys = mask[:, None, None] if window is None else mask[:, :, :1]
        if tells_documents(mask):
            keys = keys == keys.transpose(2, 3)
        square = torch.ones(length, length, dtype=torch.bool, device=mask.device)
        if window is not None:
            square = square.tril().triu(1 - window)
        elif causal:
            square = square.tril()
        known[causal] = keys & square
    return known[causal]
