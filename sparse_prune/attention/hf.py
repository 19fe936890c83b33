"""Attention layers of Hugging Face models, reached through transformers' AttentionInterface."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparse_prune.attention.found import FoundLayer, drop_handle, give_handle, handle_of, modules_of
from sparse_prune.attention.hf_masks import expand, make_mask, window_of
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
    from transformers import PreTrainedModel

    register()
    for name, module in modules_of(model).items():
        if isinstance(module, PreTrainedModel) and any(layer.name.startswith(name) for layer in layers):
            module.set_attn_implementation(IMPLEMENTATION)
    handles = [give_handle(layer) for layer in layers]
    for handle in handles:
        handle.on_load = register
    return handles


def register() -> None:
    """Let models of this process find the attention function by its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)


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
    """Keyword arguments of all calls in a forward pass; none where its source is not there, as in a frozen program."""
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return {}
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {keyword.arg: keyword.value for call in calls for keyword in call.keywords if keyword.arg is not None}


def _is_cross(name: str, module: nn.Module) -> bool:
    named = any(part in _CROSS for part in name.split("."))
    return named or "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


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
    window = window_of(attention_mask, query.shape[2])
    if attention_mask is not None and window is not None and not causal:  # the kernels' windows are for causal layers
        attention_mask, window = expand(attention_mask, causal), None

    def dense() -> Tensor:
        if softcap is not None:
            return softcapped(query, key, value, causal, _options(attention_mask, window, dropout, scaling, softcap))
        mask = attention_mask
        if mask is not None and (mask.dim() == 2 or window is not None):
            mask = expand(mask, causal)
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
