"""Attention layers that are `nn.MultiheadAttention`, alone or in `nn.TransformerEncoder`.

In eval mode torch computes these, and whole encoder layers, in fused operators. An attached layer goes through its
handle in every mode, and encoders do not convert padded batches to nested tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_prune.attention.forward import replace_forward, replaced, restore_forward, routed, run_original
from sparse_prune.attention.handles import FoundLayer, handle_of, modules_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.masks import is_bias, visible
from sparse_prune.attention.sdpa import call_is_causal
from sparse_prune.attention.trial_run import TrialCall, TrialCalls, describe, named_cross
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.dropout import draw_seed

KIND = "mha"
_NESTED = "_nested_tensor_before_pruning"


def candidates(modules: Mapping[str, nn.Module]) -> Collection[str]:
    """Return the modules with the forward pass of `nn.MultiheadAttention`."""
    return [name for name, module in modules.items() if _is_one(module)]


def _is_one(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def find(modules: Mapping[str, nn.Module], names: Collection[str], calls: TrialCalls | None) -> Iterator[FoundLayer]:
    """Describe layers; without a trial run they are taken for bidirectional."""
    for name in names:
        module: Any = modules[name]
        handle, heads = handle_of(module), module.num_heads
        made = None if calls is None else calls.get(name, [])
        causal = handle.causal if handle is not None else bool(made) and all(call.causal for call in made or [])
        problem = refused(name, module) or (_call_problem(made) if handle is None else None)
        yield FoundLayer(name, KIND, module, heads, heads, causal, problem=problem, seen=bool(made))


def refused(name: str, module: Any) -> str | None:
    """Return why a module cannot be pruned, by its attributes and its name."""
    if module.bias_k is not None or module.add_zero_attn:
        return "adds keys of its own (`add_bias_kv`, `add_zero_attn`)"
    if (module.kdim, module.vdim) != (module.embed_dim, module.embed_dim) or named_cross(name):
        return "cross-attention"
    return None


def _call_problem(calls: list[TrialCall] | None) -> str | None:
    if calls is None:
        return None
    return calls[0].problem if calls else "it was not called in the trial run"


@contextmanager
def observing(model: nn.Module) -> Iterator[TrialCalls]:
    """Record the latest call of every module."""
    calls: dict[str, list[TrialCall]] = {}
    hooks = []
    for name, module in modules_of(model).items():
        if not _is_one(module):
            continue

        def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] = [_describe(module, *args, **kwargs)]

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _describe(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> TrialCall:
    if query.is_nested:
        return TrialCall(1, 1, False, "attends to nested tensors")
    # Lengths decide, not whether tensors are the same: positions may be added to queries and keys alone.
    queries, keys = (torch.empty(1, 1, _length(module, tokens), 1, device="meta") for tokens in (query, key))
    return describe(queries, keys, keys, _as_sdpa(attn_mask))


def _length(module: Any, tokens: Tensor) -> int:
    return tokens.shape[1 if tokens.dim() == 3 and module.batch_first else 0]


def attach(model: nn.Module, layers: list[FoundLayer]) -> None:
    """Route the modules' calls through their handles."""
    taken = {layer.module for layer in layers}
    for encoder in model.modules():
        if (
            isinstance(encoder, nn.TransformerEncoder)
            and taken & set(encoder.modules())
            and _NESTED not in vars(encoder)
        ):
            vars(encoder)[_NESTED] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
    for layer in layers:
        replace_forward(layer.module, _forward)
        if _no_fast_path not in layer.module._forward_pre_hooks.values():
            layer.module.register_forward_pre_hook(_no_fast_path)


def detach(model: nn.Module) -> None:
    """Undo `attach` for all modules and their encoders."""
    for module in model.modules():
        if _NESTED in vars(module):
            module.use_nested_tensor = vars(module).pop(_NESTED)
        if not replaced(module, _forward):
            continue
        restore_forward(module)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _no_fast_path]:
            del hooks[key]


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Do nothing: an encoder layer takes no fast path around a module that has a hook."""


def _forward(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    return routed(_through, module, own, *args, **kwargs)


def _through(module: Any, own: Any, layer: PrunableAttention, *args: Any, **kwargs: Any) -> Any:
    output = _attend(module, layer, *args, **kwargs)
    return run_original(module, own, *args, **kwargs) if output is None else output


def _attend(
    module: nn.MultiheadAttention,
    layer: PrunableAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Run `nn.MultiheadAttention.forward` in the layer's mode; None if the layer stays dense from this call on.

    The returned weights are those without dropout.
    """
    if query.is_nested:
        raise ValueError(
            f"Layer {layer.name!r} must get padded tensors, got nested ones. Pad the batch, and give a "
            "`key_padding_mask`."
        )
    length, kv_len = _length(module, query), _length(module, key)
    hidden, mask = _as_sdpa(key_padding_mask), _as_sdpa(attn_mask)
    batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
    if mask is not None and mask.dim() == 3:
        mask = torch.unflatten(mask, 0, (batch, module.num_heads))
    if layer.probe_block_size is not None and hidden is not None and is_bias(hidden):
        raise ValueError(f"Layer {layer.name!r} must get a `key_padding_mask` of True and False, got other values.")
    causal = call_is_causal(layer, length, kv_len, mask, False)
    if layer.aside is not None:
        return None
    if length != kv_len:
        raise ValueError(
            f"Layer {layer.name!r} must attend to its own tokens, got {length} queries and {kv_len} keys. Give an "
            "example input of the model (LightningModule.example_input_array, or `example`)."
        )
    queries, keys, values = _project(module, query, key, value)
    key_mask = None if hidden is None else visible(hidden).reshape(batch, length)
    attn_mask = None if mask is None else visible(mask).reshape((1,) * (4 - mask.dim()) + mask.shape)
    dropout = module.dropout if module.training else 0.0
    options = AttentionOptions(
        key_mask=key_mask,
        attn_mask=None if is_causal and causal and layer.causal else attn_mask,
        dropout_p=dropout,
        seed=draw_seed(dropout),
    )
    everything = AttentionOptions(key_mask=key_mask, attn_mask=attn_mask).token_mask(length, length, query.device)
    output = layer.attend(
        queries,
        keys,
        values,
        options,
        dense=lambda: F.scaled_dot_product_attention(queries, keys, values, everything, dropout),
        causal=causal,
    )
    output = F.linear(output.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    weights = _weights(layer, queries, keys, everything) if need_weights else None
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if query.dim() == 2:
        return output[0], None if weights is None else weights[0]
    return output if module.batch_first else output.transpose(0, 1), weights


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Project to query, key and value, (batch, num_heads, length, head_dim) each."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if weight is None:
        weight = torch.cat([module.q_proj_weight, module.k_proj_weight, module.v_proj_weight])

    def tokens(given: Tensor) -> Tensor:
        return given[None] if given.dim() == 2 else given if module.batch_first else given.transpose(0, 1)

    if query is key is value:
        parts = F.linear(tokens(query), weight, bias).chunk(3, -1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = zip((query, key, value), weight.chunk(3), biases, strict=True)
        parts = tuple(F.linear(tokens(part), own, own_bias) for part, own, own_bias in given)
    return tuple(torch.unflatten(part, -1, (module.num_heads, -1)).transpose(1, 2) for part in parts)


def _as_sdpa(mask: Tensor | None) -> Tensor | None:
    """Convert a mask to SDPA's form: in boolean masks of `nn.MultiheadAttention`, True means hidden."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _weights(layer: PrunableAttention, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention probabilities under the layer's pattern, (batch, num_heads, length, length)."""
    length = query.shape[2]
    logits: Tensor = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if layer.mode != "dense" and layer.pattern is not None:
        logits = logits.masked_fill(
            ~layer.pattern_at(length, length).token_mask(length, length, query.device), -torch.inf
        )
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0)
