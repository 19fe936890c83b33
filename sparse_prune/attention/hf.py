"""Attention layers of Hugging Face models, reached through transformers' AttentionInterface."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

from torch import Tensor, nn

from sparse_prune.attention.found import FoundLayer, handle_of, modules_of
from sparse_prune.attention.hf_attention import BESIDE_EAGER, IMPLEMENTATION, REFUSED, attention_forward, claims_causal
from sparse_prune.attention.hf_configs import TakeOver, give_back
from sparse_prune.attention.hf_masks import make_mask, newest, window_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.trial import Call, Calls, describe, named_cross

KIND = "transformers"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_OWN = "_attn_implementation_before_pruning"
# What a layer may hand to attention; what else it hands over could be left out without a word.
_KNOWN = {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "softcap"}
_KNOWN |= {"position_ids", "output_attentions", "deterministic"}
_KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def candidates(modules: Mapping[str, nn.Module]) -> Collection[str]:
    """Modules whose forward pass goes through the AttentionInterface."""
    return [name for name, module in modules.items() if is_attention(type(module))]


def find(modules: Mapping[str, nn.Module], names: Collection[str], calls: Calls | None) -> Iterator[FoundLayer]:
    """What is known about them.

    A trial run decides whether they are causal, and shows what no name tells: biases in masks, keys of others.
    """
    for name in names:
        module: Any = modules[name]
        heads, kv_heads = _heads(module)
        causal = _is_causal(module, modules.values()) and not _is_cross(name, module)
        problem = refused(name, module)
        handle, made = handle_of(module), (calls or {}).get(name, [])
        if handle is not None:
            causal = handle.causal
        elif made:
            causal = all(call.causal for call in made)
            problem = problem or next((call.problem for call in made if call.problem is not None), None)
        window = getattr(module, "sliding_window", None)
        yield FoundLayer(name, KIND, module, heads, kv_heads, causal, window, problem, bool(made))


@contextmanager
def observing(model: nn.Module) -> Iterator[Calls]:
    """Note what modules ask of the AttentionInterface, whichever attention it gives them."""
    calls: dict[str, list[Call]] = {}
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:  # then no module of the model is one of its
        yield calls
        return
    names = {module: name for name, module in modules_of(model).items()}
    interface = transformers.AttentionInterface
    get = interface.get_interface

    def get_observed(self: Any, implementation: Any, default: Any) -> Callable[..., Any]:
        function = get(self, implementation, default)

        @wraps(function)
        def observed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module in names:
                calls.setdefault(names[module], []).append(_describe(module, *args, **kwargs))
            return function(module, *args, **kwargs)

        return observed

    interface.get_interface = get_observed
    try:
        yield calls
    finally:
        interface.get_interface = get


def _describe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Call:
    """What a call of the AttentionInterface shows of its layer."""
    mask, flag = newest(attention_mask, key.shape[2]), claims_causal(module, kwargs.get("is_causal"))
    if mask is None or mask.dim() != 4:  # nothing is hidden, or padding alone, as FlashAttention takes it
        return describe(query, key, value, None, is_causal=flag)
    if window_of(mask, query.shape[2]) is not None:
        return describe(query, key, value, None, is_causal=True)
    return describe(query, key, value, mask)


def attach(model: nn.Module, layers: list[FoundLayer]) -> None:
    """Route layers through their handles; those that share a config with them go on without one."""
    register()
    attention = [module for module in model.modules() if is_attention(type(module))]
    configs: dict[int, Any] = {id(layer.module.config): layer.module.config for layer in layers}
    for config in configs.values():
        sharing = [module for module in attention if getattr(module, "config", None) is config]
        if config._attn_implementation not in (IMPLEMENTATION, BESIDE_EAGER):
            for module in sharing:
                vars(module)[_OWN] = config._attn_implementation
        before = next(vars(module)[_OWN] for module in sharing if _OWN in vars(module))
        take_over = TakeOver(config, _implementation(model, config, sharing), before, register)
        take_over()
        for layer in layers:
            if layer.module.config is config:
                handle = handle_of(layer.module)
                assert handle is not None
                others = (known for known in handle.on_load if getattr(known, "config", None) is not config)
                handle.on_load = (*others, take_over)


def register() -> None:
    """Let models of this process find the attention functions by their names."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, whole in ((IMPLEMENTATION, False), (BESIDE_EAGER, True)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, partial(make_mask, whole=whole))


def _implementation(model: nn.Module, config: Any, sharing: list[nn.Module]) -> str:
    """The one for layers that share a config."""
    known = all(handle_of(module) is not None and getattr(module, "is_causal", False) for module in sharing)
    return IMPLEMENTATION if known or _sdpa_holds(model.modules(), config) else BESIDE_EAGER


def _sdpa_holds(modules: Iterable[nn.Module], config: Any) -> bool:
    """Whether SDPA computes what the models of a config compute, by its arguments and the layers' `is_causal`.

    Transformers vouches for it where a model supports SDPA.
    """
    from transformers import PreTrainedModel

    models = (module for module in modules if isinstance(module, PreTrainedModel) and module.config is config)
    return all(model._supports_sdpa for model in models)


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
    every = modules_of(model)
    found = [layer for layer in find(every, candidates(every), None) if layer.problem is None]
    modules = {getattr(layer.module, "layer_idx", None): layer.module for layer in found}
    handles: dict[Any, PrunableAttention | None] = {index: handle_of(module) for index, module in modules.items()}
    decoder = config.get_text_config(decoder=True)
    # Where a config has encoder layers too, they are its `num_hidden_layers`.
    wanted = range(getattr(decoder, "decoder_layers", decoder.num_hidden_layers))
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
    """Give transformers models the attention back that they had."""
    for module in model.modules():
        own = vars(module).pop(_OWN, None)
        if own is not None:
            give_back(module.config, own)


def is_attention(kind: type[nn.Module]) -> bool:
    """Whether a class goes through the AttentionInterface."""
    # `fully_shard` puts modules into classes of its own, which inherit the model's forward pass.
    if kind.forward.__module__.startswith("torch."):
        return False
    try:
        return _INTERFACE in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def refused(name: str, module: nn.Module) -> str | None:
    """Why a module cannot be pruned, by its name, its heads, and what its code hands to attention."""
    if _is_cross(name, module):
        return "cross-attention"
    for argument in _keywords(type(module).forward):
        if argument not in _KNOWN and _hands_over(module, argument):
            return f"{REFUSED.get(argument, 'an argument of attention that pruning does not know')} (`{argument}`)"
    return None if _heads(module)[0] else "neither it nor its config says how many heads it has"


def _heads(module: Any) -> tuple[int | None, int | None]:
    """Query and key heads; of an encoder-decoder, whose config counts those of the encoder, the layer's own."""
    counts = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads"))
    heads = next((count for count in counts if isinstance(count, int)), None)
    if heads is None:
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    # So many queries share a key head in transformers' SDPA.
    return heads, None if heads is None else heads // int(getattr(module, "num_key_value_groups", 1))


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
    """Keyword arguments of the attention function; none where the source is not there, as in a frozen program."""
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return {}
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    nodes = list(ast.walk(tree))
    chosen = [
        n for n in nodes if isinstance(n, ast.Assign | ast.AnnAssign) and n.value and _INTERFACE in ast.dump(n.value)
    ]
    names = {ast.unparse(target) for n in chosen for target in (n.targets if isinstance(n, ast.Assign) else [n.target])}
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    return {keyword.arg: keyword.value for call in calls for keyword in call.keywords if keyword.arg is not None}


def _is_cross(name: str, module: nn.Module) -> bool:
    return named_cross(name) or "Cross" in type(module).__name__ or bool(getattr(module, "is_cross_attention", False))


def _is_causal(module: Any, modules: Iterable[nn.Module]) -> bool:
    """Whether a layer of self-attention sees no future; without SDPA a mask may be all that says so."""
    if getattr(module, "is_causal", False):
        return True
    return bool(getattr(module, "is_decoder", False)) and not _sdpa_holds(modules, getattr(module, "config", None))
