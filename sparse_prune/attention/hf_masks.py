"""Masks that transformers makes once per forward pass, in a form for the attention function that its layers call.

Masks with one value per token stay small until a dense layer needs them over all pairs of tokens: which tokens are real
(boolean), or the number of a token's document in packed sequences (integers), with a causal sliding window or without.
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
from sparse_prune.kernels.derived import of_tensor

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
    """Make the mask of a call; None hides nothing but what causality does.

    It is (batch, kv_len) with one value per token; (batch, 1, window, kv_len), the same repeated, with a causal sliding
    window shorter than the sequence (`window_of`); else (batch, 1, q_len, kv_len). transformers may call again with the
    result, and takes masks of four dimensions as they are.

    Masks cover the keys from the first one to the latest. Their width tells the attention function how many keys of a
    static cache count, and how many a cache with a window has dropped.

    With `whole`, masks are those of eager attention, causality included, and None hides nothing at all.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    # A caller that asks for a whole causal mask may change it.
    bidirectional = mask_function is bidirectional_mask_function
    # Gemma 4 takes rows out of the mask for layers that use the keys of others.
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
    """Places of a static cache for keys after the last query."""
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
    """The mask with one value per token, as `make_mask` returns it; `_LARGE` if a mask over all pairs is needed."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if q_length != kv_length or not (plain or (window and not q_offset)):
        return _LARGE
    tokens = documents
    if tokens is None and attention_mask is not None:
        tokens = attention_mask[:, :kv_length].bool()
        # A tracer cannot read the mask, so it keeps one that hides nothing.
        if not torch.compiler.is_compiling() and bool(tokens.all()):
            tokens = None
    if window and window < kv_length:
        if tokens is None:
            tokens = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_length)
        return repeated(tokens, window) if tokens.shape == (batch_size, kv_length) else _LARGE
    return tokens if tokens is None or tokens.shape[1] == kv_length else _LARGE


def _of_documents(mask_function: Any) -> tuple[Any, Tensor | None]:
    """The mask function inside each document, and each token's document, int32, (batch, length), of packed sequences.

    Without packed sequences, the mask function and None. Inside a document positions are consecutive.
    """
    from transformers import masking_utils

    if torch.compiler.is_compiling():  # a tracer cannot compare functions
        return mask_function, None
    packed = masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__
    both = getattr(mask_function, "__code__", None) is masking_utils.and_masks().__code__
    parts = _held(mask_function)["mask_functions"] if both else ()
    documents = [part for part in parts if getattr(part, "__code__", None) is packed]
    others = [part for part in parts if getattr(part, "__code__", None) is not packed]
    if len(documents) != 1 or len(others) != 1:
        return mask_function, None
    # Newer versions count positions from the start of the document.
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    remapped = remap and getattr(others[0], "__code__", None) is remap(None, torch.empty(0)).__code__
    each = _held(others[0])["mask_function"] if remapped else others[0]
    return each, _held(documents[0])["packed_sequence_mask"].int()


def _held(function: Any) -> dict[str, Any]:
    """The variables that a function captures, by name."""
    return dict(getclosurevars(function).nonlocals) if isinstance(function, FunctionType) else {}


def _window(mask_function: Any, size: int | None) -> int | None:
    """The window in tokens, the query's own included, if the mask is a causal sliding window and nothing else."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    # A mask of one row could stand for all queries; and a tracer cannot compare functions.
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

    `cu_seqlens`, (documents + 1,), ascends from 0 to batch * length: rows follow each other. Whether the call is causal
    counts if the mask does not say so.
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
    """Return how many keys of a sequence, which no query sees, a cache has dropped before its last `kv_len`.

    None if that cannot be told, or a query sees them. A mask of `make_mask` tells, even if the model cut it. Other
    masks may cover the remaining keys alone, as many as a window leaves.
    """
    if q_len == kv_len:
        return 0
    whole = None if mask is None else _root(mask)
    made: int | None = None if whole is None else _MADE.get(whole)  # type: ignore[no-untyped-call, unused-ignore]
    if whole is not None and made is not None:
        dropped = max(0, made - kv_len)
        return None if _shows_first(whole, dropped) else dropped
    unknown = (mask is not None and mask.shape[-1] > kv_len) or (window is not None and kv_len == window - 1 + q_len)
    return None if unknown else 0


def _shows_first(mask: Tensor, keys: int) -> bool:
    """Whether a boolean mask shows any of the first keys, read once per forward pass."""
    return keys > 0 and of_tensor(mask, ("shows", keys), lambda: bool(mask[..., :keys].any()))


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
