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

from sparse_prune.attention.handles import FoundLayer, handle_of, modules_of
from sparse_prune.attention.hf_attention import BESIDE_EAGER, IMPLEMENTATION, REFUSED, attention_forward, claims_causal
from sparse_prune.attention.hf_configs import restore_implementation, set_implementation
from sparse_prune.attention.hf_make_mask import make_mask
from sparse_prune.attention.hf_masks import newest, window_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.trial_run import TrialCall, TrialCalls, describe, named_cross

KIND = "transformers"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_OWN = "_attn_implementation_before_pruning"
# Arguments of attention that pruning knows; any other one could be ignored in silence.
_KNOWN = {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "softcap"}
_KNOWN |= {"position_ids", "output_attentions", "deterministic"}
_KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def candidates(modules: Mapping[str, nn.Module]) -> Collection[str]:
    """Return the modules whose forward pass goes through the AttentionInterface."""
    return [name for name, module in modules.items() if is_attention(type(module))]


def find(modules: Mapping[str, nn.Module], names: Collection[str], calls: TrialCalls | None) -> Iterator[FoundLayer]:
    """Describe layers; a trial run shows whether they are causal, add biases in masks, or use keys of others."""
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
def observing(model: nn.Module) -> Iterator[TrialCalls]:
    """Record the calls of attention functions that modules get from the AttentionInterface."""
    calls: dict[str, list[TrialCall]] = {}
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:  # then the model is not of transformers
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
) -> TrialCall:
    """Describe a call of an attention function."""
    mask, flag = newest(attention_mask, key.shape[2]), claims_causal(module, kwargs.get("is_causal"))
    if mask is None or mask.dim() != 4:  # nothing is hidden, or padding alone in FlashAttention's form
        return describe(query, key, value, None, is_causal=flag)
    if window_of(mask, query.shape[2]) is not None:
        return describe(query, key, value, None, is_causal=True)
    return describe(query, key, value, mask)


def attach(model: nn.Module, layers: list[FoundLayer]) -> None:
    """Route layers through their handles; other layers with the same config keep their attention."""
    register()
    attention = [module for module in model.modules() if is_attention(type(module))]
    configs: dict[int, Any] = {id(layer.module.config): layer.module.config for layer in layers}
    for config in configs.values():
        sharing = [module for module in attention if getattr(module, "config", None) is config]
        if config._attn_implementation not in (IMPLEMENTATION, BESIDE_EAGER):
            for module in sharing:
                vars(module)[_OWN] = config._attn_implementation
        before = next(vars(module)[_OWN] for module in sharing if _OWN in vars(module))
        take_over = partial(_take_over, config, _implementation(model, config, sharing), before)
        take_over()
        for layer in layers:
            if layer.module.config is config:
                handle = handle_of(layer.module)
                assert handle is not None
                others = (known for known in handle.on_load if known.args[0] is not config)
                handle.on_load = (*others, take_over)


def _take_over(config: Any, implementation: str, before: str | None) -> None:
    """Set a config's implementation, here or where its layers were copied or loaded: another process registers none."""
    register()
    set_implementation(config, implementation, before)


def register() -> None:
    """Register the attention functions in this process under their names."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, whole in ((IMPLEMENTATION, False), (BESIDE_EAGER, True)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, partial(make_mask, whole=whole))


def _implementation(model: nn.Module, config: Any, sharing: list[nn.Module]) -> str:
    """Choose the implementation for layers that share a config."""
    known = all(handle_of(module) is not None and getattr(module, "is_causal", False) for module in sharing)
    return IMPLEMENTATION if known or _sdpa_holds(model.modules(), config) else BESIDE_EAGER


def _sdpa_holds(modules: Iterable[nn.Module], config: Any) -> bool:
    """Whether SDPA, with the layers' `is_causal`, computes what the models of a config compute: if they support it."""
    from transformers import PreTrainedModel

    models = (module for module in modules if isinstance(module, PreTrainedModel) and module.config is config)
    return all(model._supports_sdpa for model in models)


def attached_layers(model: nn.Module) -> list[PrunableAttention]:
    """Return the handles of an attached transformers decoder, one per layer, in the order of its cache.

    Raises:
        ValueError: If the model is not a decoder, or a layer of its cache has no handle or is not causal.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"`model` must be a transformers decoder, got {type(model).__name__}. Give the model that generates."
        )
    modules = [module for module in model.modules() if is_attention(type(module))]
    handles = {getattr(m, "layer_idx", None): handle for m in modules if (handle := handle_of(m)) is not None}
    decoder = config.get_text_config(decoder=True)
    # A config with encoder layers too counts those as `num_hidden_layers`.
    wanted = range(getattr(decoder, "decoder_layers", decoder.num_hidden_layers))
    missing = [index for index in wanted if index not in handles]
    if missing:
        raise ValueError(
            f"`model` must be attached in all its layers, got no handle in layers {missing[:8]}. Call "
            "`sparse_prune.attention.attach(model)` first; models with other kinds of layers are not supported."
        )
    attached = [handles[index] for index in wanted]
    bidirectional = [handle.name for handle in attached if not handle.causal]
    if bidirectional:
        raise ValueError(
            f"`model` must be causal in all its layers, got bidirectional {bidirectional[:4]}. Use a cache that evicts "
            "nothing, such as DynamicCache()."
        )
    return attached


def detach(model: nn.Module) -> None:
    """Undo `attach` for all layers of transformers models."""
    for module in model.modules():
        own = vars(module).pop(_OWN, None)
        if own is not None:
            restore_implementation(module.config, own)


def is_attention(kind: type[nn.Module]) -> bool:
    """Whether the forward pass of a class goes through the AttentionInterface."""
    # `fully_shard` gives modules classes of its own, which inherit the model's forward pass.
    if kind.forward.__module__.startswith("torch."):
        return False
    try:
        return _INTERFACE in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def refused(name: str, module: nn.Module) -> str | None:
    """Return why a module cannot be pruned, by its name, its heads, and the arguments that its code gives attention."""
    if _is_cross(name, module):
        return "cross-attention"
    for argument in _keywords(type(module).forward):
        if argument not in _KNOWN and _hands_over(module, argument):
            return f"{REFUSED.get(argument, 'an argument of attention that pruning does not know')} (`{argument}`)"
    return None if _heads(module)[0] else "neither it nor its config says how many heads it has"


def _heads(module: Any) -> tuple[int | None, int | None]:
    """Count query and key heads, by the layer itself or else by its config, which may count an encoder's."""
    counts = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads"))
    heads = next((count for count in counts if isinstance(count, int)), None)
    if heads is None:
        heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    # In transformers' SDPA so many query heads share a key head.
    return heads, None if heads is None else heads // int(getattr(module, "num_key_value_groups", 1))


def _hands_over(module: nn.Module, argument: str) -> bool:
    """Whether the forward pass gives the attention function an argument; an attribute that is None does not count."""
    value = _keywords(type(module).forward).get(argument)
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self":
        return getattr(module, value.attr, None) is not None
    return value is not None


@cache
def _keywords(forward: Callable[..., Any]) -> dict[str, ast.expr]:
    """Read the keyword arguments of calls of the attention function; none without source, as in a frozen program."""
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
    """Whether a self-attention layer is causal; models without SDPA may say so by `is_decoder` and masks alone."""
    if getattr(module, "is_causal", False):
        return True
    return bool(getattr(module, "is_decoder", False)) and not _sdpa_holds(modules, getattr(module, "config", None))
