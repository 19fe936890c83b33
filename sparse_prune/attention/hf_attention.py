"""The attention function that transformers calls for attached layers, through its AttentionInterface."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparse_prune.attention.cached_keys import CachedKeys
from sparse_prune.attention.handles import handle_of
from sparse_prune.attention.hf_masks import (
    boolean,
    dropped_keys,
    expand,
    keep_apart,
    newest,
    shows_all,
    tells_documents,
    tokens_of,
    window_of,
)
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.softcap import softcapped
from sparse_prune.attention.trial_run import BIAS
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.dropout import draw_seed

log = logging.getLogger(__name__)
IMPLEMENTATION = "sparse_prune"
BESIDE_EAGER = "sparse_prune_beside_eager"
"""The implementation for configs that attached layers share with layers in eager attention: all get eager masks."""
REFUSED = {
    "position_bias": "an additive position bias",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "indices": "a sparse index of its own",
    "block_indices": "a sparse index of its own",
    "cache": "a paged cache",
}
"""Arguments of attention that pruning cannot respect -> what they are."""
_DROPPED_BY_SDPA = ("s_aux", "sinks", "indices", "block_indices")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for the AttentionInterface; returns (batch, q_len, num_heads, head_dim) and None."""
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:  # the room of a static cache
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    handle = handle_of(module)
    if handle is None:
        return _run_own_eagerly(module, query, key, value, attention_mask, **kwargs)
    traceable = handle.traceable and query.shape[2] == key.shape[2] and not kwargs.get("dropout")
    traceable = traceable and not isinstance(key, CachedKeys)
    attention = _attend if traceable else _attend_eagerly
    return attention(handle, module, query, key, value, attention_mask, **kwargs)


def _run_own(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the own attention of a layer without a handle."""
    eager = module.config._attn_implementation == BESIDE_EAGER
    _refuse_arguments(type(module).__name__, kwargs, ("indices", "block_indices") if eager else _DROPPED_BY_SDPA)
    if not eager:
        window = window_of(attention_mask, query.shape[2])
        return _dense(module, query, key, value, attention_mask, window, **kwargs).transpose(1, 2).contiguous(), None
    output: tuple[Tensor, Tensor | None] = _eager_function(type(module))(
        module, query, key, value, newest(attention_mask, key.shape[2]), **kwargs
    )
    return output


_run_own_eagerly: Callable[..., tuple[Tensor, Tensor | None]] = torch.compiler.disable(_run_own)  # type: ignore[no-untyped-call, unused-ignore]


def _eager_function(kind: type[nn.Module]) -> Callable[..., Any]:
    """Find the eager attention function in the file of a layer's class."""
    forward: Any = inspect.unwrap(kind.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            function: Callable[..., Any] = forward.__globals__[name]
            return function
    raise ValueError(
        f"{kind.__name__} must name its eager attention `eager_attention_forward`, as transformers does, got none. "
        "Its layers, which stay dense, need that function. Prune another model."
    )


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute the model's own attention by SDPA, (batch, num_heads, q_len, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = claims_causal(module, is_causal)
    mask = newest(mask, key.shape[2])
    if softcap is not None:
        mask, window = _for_kernels(mask, window, causal)
        causal = causal and (mask is None or mask.dim() == 2 or window is not None)
        return softcapped(query, key, value, causal, _options(mask, window, query.shape[2], dropout, scaling, softcap))
    if mask is not None and (mask.dim() == 2 or window is not None):
        mask = expand(mask, causal)
    output, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return torch.as_tensor(output).transpose(1, 2)


def _for_kernels(mask: Tensor | None, window: int | None, causal: bool) -> tuple[Tensor | None, int | None]:
    """Return mask and window for the kernels, whose windows are causal: others become part of the mask."""
    return (mask, window) if mask is None or window is None or causal else (expand(mask, causal), None)


def _attend(
    handle: PrunableAttention,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    beside_eager = module.config._attn_implementation == BESIDE_EAGER
    active = not handle.idle
    packed = kwargs.get("cu_seq_lens_q") is not None
    if attention_mask is not None and (beside_eager or active or packed or not handle.seen):
        attention_mask = boolean(attention_mask)
    if beside_eager:  # the mask is whole
        is_causal = False
    _refuse_arguments(handle.name, kwargs, REFUSED)
    if active and attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.int32):
        handle.refuse(BIAS)
    q_len, kv_len = query.shape[2], key.shape[2]
    if packed and q_len == kv_len:
        flag = claims_causal(module, is_causal)
        attention_mask = keep_apart(attention_mask, kwargs["cu_seq_lens_q"], query.shape[0], q_len, flag)
    if handle.probe_block_size is not None and q_len == kv_len and shows_all(attention_mask, q_len):
        _tell_of_restarts(type(module).__name__, kwargs.get("position_ids"))
    window = window_of(attention_mask, q_len)
    causal = handle.causal
    if active or not handle.seen:
        causal = _shows_no_later_key(handle, claims_causal(module, is_causal), attention_mask, window, q_len, kv_len)
    handle.sliding_window = kwargs.get("sliding_window")
    mask, window = _for_kernels(attention_mask, window, causal and handle.causal)

    def dense() -> Tensor:
        return _dense(module, query, key, value, mask, window, dropout, scaling, is_causal, softcap, **kwargs)

    options = _options(newest(mask, kv_len), window, q_len, dropout, scaling, softcap)
    dropped = dropped_keys(attention_mask, q_len, kv_len, handle.sliding_window)
    output = handle.attend(query, key, value, options, dense=dense, dropped=dropped, causal=causal)
    return output.transpose(1, 2).contiguous(), None


def _tell_of_restarts(kind: str, position_ids: Tensor | None) -> None:
    """Warn if packed documents in a row see each other."""
    if position_ids is not None and position_ids.dim() == 2 and bool((position_ids.diff(dim=1) < 0).any()):
        _say_that_documents_mix(kind)


@cache
def _say_that_documents_mix(kind: str) -> None:
    log.warning(
        "The positions of %s restart within a row, but the documents there see each other: transformers keeps them "
        "apart without `attention_mask` and without a cache. Pass `use_cache=False` and no `attention_mask`, or "
        "`cu_seq_lens_q`.",
        kind,
    )


def claims_causal(module: Any, is_causal: bool | None) -> bool:
    """Whether a call without a mask is causal, by its own argument or else by its module."""
    return bool(getattr(module, "is_causal", False)) if is_causal is None else bool(is_causal)


def _shows_no_later_key(
    handle: PrunableAttention, flag: bool, mask: Tensor | None, window: int | None, q_len: int, kv_len: int
) -> bool:
    """Whether a call is causal: the flag holds unless there is a mask over all pairs, which is read instead."""
    if window is not None:
        return True
    pairs = None if mask is None or mask.dim() == 2 else mask
    if pairs is not None and pairs.shape[-1] != kv_len and not torch.compiler.is_compiling():
        return handle.causal
    return handle.hides_later_keys(pairs, flag, q_len, kv_len)


_attend_eagerly = torch.compiler.disable(_attend)  # type: ignore[no-untyped-call, unused-ignore]


def _options(
    mask: Tensor | None, window: int | None, q_len: int, dropout: float, scaling: float | None, softcap: float | None
) -> AttentionOptions:
    tokens = tokens_of(mask, q_len)
    pairs = mask is not None and mask.dim() == 4 and window is None and mask.dtype == torch.bool
    return AttentionOptions(
        scale=scaling,
        key_mask=None if tells_documents(tokens) else tokens,
        attn_mask=mask if pairs else None,
        documents=tokens if tells_documents(tokens) else None,
        window=window,
        dropout_p=dropout,
        seed=draw_seed(dropout),
        softcap=softcap,
    )


def _refuse_arguments(name: str, kwargs: dict[str, Any], refused: Iterable[str]) -> None:
    """Refuse arguments that would otherwise be ignored in silence."""
    for argument in refused:
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"Layer {name!r} uses {REFUSED[argument]} (`{argument}`), which pruning does not support. "
                "Prune another model."
            )
