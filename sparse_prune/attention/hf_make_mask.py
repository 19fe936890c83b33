"""Makes the masks that transformers asks for once per forward pass, in the small form that `hf_masks` reads."""

from __future__ import annotations

from inspect import getclosurevars
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sparse_prune.attention.hf_masks import note_width, repeated

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
    """Make the mask of a call; None hides nothing but what causality hides.

    A mask with one value per token is (batch, kv_len); with a causal sliding window shorter than the sequence it is
    repeated to (batch, 1, window, kv_len). Any other mask is (batch, 1, q_len, kv_len). transformers may call again
    with the result, and takes masks of four dimensions as they are.

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
        note_width(mask)
    made: Tensor | None = mask
    return made


def _room(q_length: int, kv_length: int, q_offset: int, kv_offset: int, mask_function: Any) -> int:
    """Count the places of a static cache for keys after the last query."""
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
    """Make the mask with one value per token; `_LARGE` if a mask over all pairs is needed."""
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
    """Take packed sequences apart: the mask function inside each document, and each token's document.

    Documents are int32, (batch, length); None without packed sequences. Inside a document positions are consecutive.
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
    """Return the variables that a function captures, by name."""
    return dict(getclosurevars(function).nonlocals) if isinstance(function, FunctionType) else {}


def _window(mask_function: Any, size: int | None) -> int | None:
    """Return the window in tokens, the query's own included, if the mask is a causal sliding window and no more."""
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
