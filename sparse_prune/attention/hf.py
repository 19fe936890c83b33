"""Attention layers of Hugging Face models, reached through transformers' AttentionInterface."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_prune.attention.found import FoundLayer, drop_handle, give_handle, handle_of, modules_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.softcap import softcapped
from sparse_prune.attention.trial import BIAS, Calls
from sparse_prune.kernels import AttentionOptions

IMPLEMENTATION = "sparse_prune"
_CROSS = ("encoder_attn", "crossattention", "cross_attn", "EncDecAttention")
_REFUSED = {
    "position_bias": "an additive position bias",
    "s_aux": "learned attention sinks",
    "cache": "a paged cache",
}


def find(modules: dict[str, nn.Module], calls: Calls | None = None) -> Iterator[FoundLayer]:
    """Attention modules whose forward pass goes through the AttentionInterface.

    Args:
        modules: By qualified name.
        calls: What they called in a trial run, which shows biases that hide in a mask; None: there was none.
    """
    for name, module in modules.items():
        if is_attention(type(module)):
            config: Any = getattr(module, "config", None)
            heads = getattr(config, "num_attention_heads", None)
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            causal = bool(getattr(module, "is_causal", False))
            window = getattr(module, "sliding_window", None)
            problem = _problem(name, module, heads)
            if problem is None and any(call.problem == BIAS for call in (calls or {}).get(name, ())):
                problem = BIAS
            yield FoundLayer(name, "transformers", module, heads, kv_heads, causal, window, problem)


def attach(model: nn.Module, layers: list[FoundLayer]) -> list[PrunableAttention]:
    """Route layers of the transformers models inside `model` through a handle each."""
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, _attention_mask)
    for name, module in modules_of(model).items():
        if isinstance(module, PreTrainedModel) and any(layer.name.startswith(name) for layer in layers):
            module.set_attn_implementation(IMPLEMENTATION)
    return [give_handle(layer) for layer in layers]


def attached_layers(model: nn.Module) -> list[PrunableAttention]:
    """Handles of a decoder that was taken over, one per layer, in the order of its cache.

    Args:
        model: A transformers model.

    Raises:
        ValueError: If the model is no decoder, or if not every layer of its cache has a handle and is causal.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`model` must be a transformers decoder, got {type(model).__name__}.")
    found = [layer for layer in find(modules_of(model)) if layer.problem is None]
    modules = {getattr(layer.module, "layer_idx", None): layer.module for layer in found}
    handles: dict[Any, PrunableAttention | None] = {index: handle_of(module) for index, module in modules.items()}
    wanted = range(config.get_text_config(decoder=True).num_hidden_layers)
    missing = [index for index in wanted if handles.get(index) is None]
    if missing:
        raise ValueError(
            f"`model` must have attention that was taken over in all its layers, got none in layers {missing[:8]}. "
            "Call `sparse_prune.attention.attach(model)` first; models with other layers are not supported."
        )
    attached = [handle for index in wanted if (handle := handles[index]) is not None]
    bidirectional = [handle.name for handle in attached if not handle.causal]
    if bidirectional:
        raise ValueError(f"`model` must be causal in all its layers, got bidirectional {bidirectional[:4]}.")
    return attached


def detach(model: nn.Module) -> None:
    """Give transformers models their own SDPA attention back."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if is_attention(type(module)):
            drop_handle(module)
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == IMPLEMENTATION:
            module.set_attn_implementation("sdpa")


def is_attention(kind: type[nn.Module]) -> bool:
    """Whether a class goes through the AttentionInterface."""
    # `fully_shard` puts modules into classes of its own, which inherit the model's forward pass.
    if kind.forward.__module__.startswith("torch."):
        return False
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def _problem(name: str, module: nn.Module, heads: int | None) -> str | None:
    if _is_cross(name, module):
        return "cross-attention"
    for argument in ("position_bias", "s_aux"):
        if _hands_over(module, argument):
            return f"{_REFUSED[argument]} (`{argument}`)"
    return None if heads else "its config has no `num_attention_heads`"


def _hands_over(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward pass gives the attention function such an argument.

    An attribute of the module that is None does not count; what the forward pass computes does, as it may be anything.
    """
    value = _keywords(type(module).forward).get(argument)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self":
        return getattr(module, value.attr, None) is not None
    return value is not None


@cache
def _keywords(forward: Callable[..., Any]) -> dict[str, ast.expr]:
    """Keyword arguments of all calls in a forward pass."""
    source = inspect.getsource(forward)
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {keyword.arg: keyword.value for call in calls for keyword in call.keywords if keyword.arg is not None}


def _is_cross(name: str, module: nn.Module) -> bool:
    named = any(part in _CROSS for part in name.split("."))
    return named or "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def _attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a call; None hides nothing beside what causality does.

    (batch, kv_len) if it is padding alone; (batch, 1, window, kv_len), padding repeated, if it is padding and a causal
    sliding window shorter than the sequence (`_window_of`); else (batch, 1, q_len, kv_len). transformers may call again
    with the result: masks of four dimensions it takes as they are.

    Masks for a static cache end with the latest key: from their width `_attention_forward` knows how many keys count.
    """
    from transformers.masking_utils import causal_mask_function

    mask_function = causal_mask_function if mask_function is None else mask_function
    room = _room(q_length, kv_length, int(q_offset), kv_offset, mask_function)
    if room:
        kv_length, kwargs["allow_is_causal_skip"] = kv_length - room, False
    mask = _mask(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs)
    if mask is None and room:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
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
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor | None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    window = None if plain else _window(mask_function, kwargs.get("local_size"))
    if (plain or (window and not q_offset)) and q_length == kv_length and not kv_offset:
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
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
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


def _window_of(mask: Tensor | None, q_len: int) -> int | None:
    """The window of a mask that stands for one: its rows are fewer than the queries, which no other mask's are."""
    rows = 1 if mask is None or mask.dim() < 4 else mask.shape[2]
    return rows if 1 < rows < q_len else None


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as the AttentionInterface wants it; returns (batch, q_len, num_heads, head_dim)."""
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:  # the room of a static cache
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    handle = handle_of(module)
    traceable = handle is not None and handle.traceable and query.shape[2] == key.shape[2]
    # What still moves, probes or measures is not for a compiler to trace.
    attention = _attend if traceable and not kwargs.get("dropout") else _attend_eagerly
    return attention(module, query, key, value, attention_mask, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    handle = handle_of(module)
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    softcap = kwargs.pop("softcap", None)
    window = _window_of(attention_mask, query.shape[2])
    if attention_mask is not None and window is not None and not causal:  # the kernels' windows are for causal layers
        attention_mask, window = _expand(attention_mask, causal), None

    def dense() -> Tensor:
        if softcap is not None:
            return softcapped(query, key, value, causal, _options(attention_mask, window, dropout, scaling, softcap))
        mask = attention_mask
        if mask is not None and (mask.dim() == 2 or window is not None):
            mask = _expand(mask, causal)
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return torch.as_tensor(output).transpose(1, 2)

    if handle is None:
        return dense().transpose(1, 2).contiguous(), None
    if causal != handle.causal:
        raise ValueError(
            f"Layer {handle.name!r} must be called with is_causal={handle.causal}, got {causal}. "
            "Set the module's `is_causal` before pruning starts."
        )
    if handle.mode != "dense" or handle.probe_block_size is not None:
        _refuse(handle, attention_mask, kwargs)
    handle.sliding_window = kwargs.get("sliding_window")
    options = _options(attention_mask, window, dropout, scaling, softcap)
    output = handle.attend(query, key, value, options, dense=dense)
    return output.transpose(1, 2).contiguous(), None


_attend_eagerly = torch.compiler.disable(_attend)  # type: ignore[no-untyped-call, unused-ignore]


def _options(
    mask: Tensor | None, window: int | None, dropout: float, scaling: float | None, softcap: float | None
) -> AttentionOptions:
    key_mask = mask if mask is not None and mask.dim() == 2 else None
    if mask is not None and window is not None:
        # One value for all keys: there is no padding.
        key_mask, mask = mask[:, 0, 0] if mask.stride(3) else None, None
    return AttentionOptions(
        scale=scaling,
        key_mask=key_mask,
        attn_mask=mask if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool else None,
        window=window,
        dropout_p=dropout,
        seed=int(torch.randint(2**62, ())) if dropout else None,
        softcap=softcap,
    )


def _refuse(handle: PrunableAttention, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """What a pattern cannot respect must not be dropped in silence."""
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"Layer {handle.name!r} uses {meaning} (`{name}`), which pruning does not support. Prune another model."
            )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"Layer {handle.name!r} must get a boolean attention mask, got {mask.dtype}. "
            "Pass the (batch, length) padding mask, or a boolean 4D mask. If the layer adds a bias to its mask, set "
            "`example_input_array` on the LightningModule: the layer is then left dense."
        )


_EXPANDED = WeakTensorKeyDictionary()  # by the mask of a forward pass, which all its layers get


def _expand(mask: Tensor, causal: bool) -> Tensor:
    """The (batch, 1, length, length) mask that transformers makes for SDPA of padding, or of padding and a window."""
    known = _EXPANDED.setdefault(mask, {})
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
