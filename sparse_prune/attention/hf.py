"""Attention layers of Hugging Face models, reached through transformers' AttentionInterface."""

from __future__ import annotations

import ast
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from sparse_prune.attention.found import FoundLayer, drop_handle, give_handle, handle_of, modules_of
from sparse_prune.attention.hf_configs import TakeOver, give_back
from sparse_prune.attention.hf_masks import (
    boolean,
    expand,
    keep_apart,
    make_mask,
    may_lack_keys,
    shows_all,
    tells_documents,
    tokens_of,
    window_of,
)
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.masks import hides_future
from sparse_prune.attention.packed import PackedKeys
from sparse_prune.attention.softcap import softcapped
from sparse_prune.attention.trial import Call, Calls, describe, named_cross
from sparse_prune.kernels import AttentionOptions

log = logging.getLogger(__name__)
IMPLEMENTATION = "sparse_prune"
BESIDE_EAGER = "sparse_prune_beside_eager"
"""The same for configs of layers of which some must go on in eager attention: all get the masks of that."""
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_OWN = "_attn_implementation_before_pruning"
_REFUSED = {
    "position_bias": "an additive position bias",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "indices": "a sparse index of its own",
    "block_indices": "a sparse index of its own",
    "cache": "a paged cache",
}
_DROPPED_BY_SDPA = ("s_aux", "sinks", "indices", "block_indices")
# What a layer may hand to attention; what else it hands over could be left out without a word.
_KNOWN = {"query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "softcap"}
_KNOWN |= {"position_ids", "output_attentions", "deterministic"}
_KNOWN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def find(modules: dict[str, nn.Module], calls: Calls | None = None) -> Iterator[FoundLayer]:
    """Attention modules whose forward pass goes through the AttentionInterface.

    Args:
        modules: By qualified name.
        calls: What they asked of the AttentionInterface in a trial run, which decides whether they are causal and shows
            what no name tells: biases in masks, keys of others; None: there was none.
    """
    for name, module in modules.items():
        if is_attention(type(module)):
            heads, kv_heads = _heads(module)
            window = getattr(module, "sliding_window", None)
            causal = _is_causal(module, modules.values()) and not _is_cross(name, module)
            problem = _problem(name, module, heads)
            handle, made = handle_of(module), (calls or {}).get(name, [])
            if handle is not None:
                causal = handle.causal
            elif made:
                causal = all(call.causal for call in made)
                problem = problem or next((call.problem for call in made if call.problem is not None), None)
            yield FoundLayer(name, "transformers", module, heads, kv_heads, causal, window, problem, bool(made))


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
    mask, flag = _newest(attention_mask, key.shape[2]), _flag(module, kwargs.get("is_causal"))
    if mask is None or mask.dim() != 4:  # nothing is hidden, or padding alone, as FlashAttention takes it
        return describe(query, key, value, None, is_causal=flag)
    if window_of(mask, query.shape[2]) is not None:
        return describe(query, key, value, None, is_causal=True)
    return describe(query, key, value, mask)


def attach(model: nn.Module, layers: list[FoundLayer]) -> list[PrunableAttention]:
    """Route layers through a handle each; those that share a config with them go on without one."""
    register()
    handles = [give_handle(layer) for layer in layers]
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
        for handle, layer in zip(handles, layers, strict=True):
            if layer.module.config is config:
                handle.on_load = take_over
    return handles


def register() -> None:
    """Let models of this process find the attention functions by their names."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, whole in ((IMPLEMENTATION, False), (BESIDE_EAGER, True)):
        AttentionInterface.register(name, _attention_forward)
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
    found = [layer for layer in find(modules_of(model)) if layer.problem is None]
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
        if is_attention(type(module)):
            drop_handle(module)
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


def _problem(name: str, module: nn.Module, heads: int | None) -> str | None:
    if _is_cross(name, module):
        return "cross-attention"
    for argument in _keywords(type(module).forward):
        if argument not in _KNOWN and _hands_over(module, argument):
            return f"{_REFUSED.get(argument, 'an argument of attention that pruning does not know')} (`{argument}`)"
    return None if heads else "neither it nor its config says how many heads it has"


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


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as the AttentionInterface wants it; returns (batch, q_len, num_heads, head_dim)."""
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:  # the room of a static cache
        key, value = key[:, :, : attention_mask.shape[-1]], value[:, :, : attention_mask.shape[-1]]
    handle = handle_of(module)
    if handle is None:
        return _run_own_eagerly(module, query, key, value, attention_mask, **kwargs)
    # What still moves, probes or measures is not for a compiler to trace.
    traceable = handle.traceable and query.shape[2] == key.shape[2] and not kwargs.get("dropout")
    traceable = traceable and not isinstance(key, PackedKeys)
    attention = _attend if traceable else _attend_eagerly
    return attention(handle, module, query, key, value, attention_mask, **kwargs)


def _run_own(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """A layer without a handle computes what it did."""
    eager = module.config._attn_implementation == BESIDE_EAGER
    _refuse_arguments(type(module).__name__, kwargs, ("indices", "block_indices") if eager else _DROPPED_BY_SDPA)
    if not eager:
        window = window_of(attention_mask, query.shape[2])
        return _dense(module, query, key, value, attention_mask, window, **kwargs).transpose(1, 2).contiguous(), None
    output: tuple[Tensor, Tensor | None] = _eager_function(type(module))(
        module, query, key, value, _newest(attention_mask, key.shape[2]), **kwargs
    )
    return output


_run_own_eagerly: Callable[..., tuple[Tensor, Tensor | None]] = torch.compiler.disable(_run_own)  # type: ignore[no-untyped-call, unused-ignore]


def _eager_function(kind: type[nn.Module]) -> Callable[..., Any]:
    """What the file of a layer's class has for eager attention."""
    forward: Any = inspect.unwrap(kind.forward)
    for name in forward.__code__.co_names:
        if name.endswith("eager_attention_forward"):
            function: Callable[..., Any] = forward.__globals__[name]
            return function
    raise ValueError(
        f"{kind.__name__} must name its eager attention `eager_attention_forward`, as transformers does, got none. Its "
        "layers are left dense, which takes that function: prune another model."
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
    """The model's own attention by SDPA, (batch, num_heads, q_len, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = _flag(module, is_causal)
    mask = _newest(mask, key.shape[2])
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


def _newest(mask: Tensor | None, kv_len: int) -> Tensor | None:
    """A mask without the keys that a cache with a window has dropped."""
    return mask if mask is None or mask.shape[-1] <= kv_len else mask[..., -kv_len:]


def _for_kernels(mask: Tensor | None, window: int | None, causal: bool) -> tuple[Tensor | None, int | None]:
    """The kernels' windows are for causal layers."""
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
    _refuse_arguments(handle.name, kwargs, _REFUSED)
    if active:
        _refuse_bias(handle, attention_mask)
    q_len, kv_len = query.shape[2], key.shape[2]
    if packed and q_len == kv_len:
        flag = _flag(module, is_causal)
        attention_mask = keep_apart(attention_mask, kwargs["cu_seq_lens_q"], query.shape[0], q_len, flag)
    if handle.probe_block_size is not None and q_len == kv_len and shows_all(attention_mask, q_len):
        _tell_of_restarts(type(module).__name__, kwargs.get("position_ids"))
    window = window_of(attention_mask, q_len)
    causal = handle.causal
    if active or not handle.seen:
        causal = _shows_no_later_key(handle, _flag(module, is_causal), attention_mask, window, q_len, kv_len)
    handle.sliding_window = kwargs.get("sliding_window")
    mask, window = _for_kernels(attention_mask, window, causal and handle.causal)

    def dense() -> Tensor:
        return _dense(module, query, key, value, mask, window, dropout, scaling, is_causal, softcap, **kwargs)

    options = _options(mask, window, query.shape[2], dropout, scaling, softcap)
    whole = not may_lack_keys(attention_mask, q_len, kv_len, handle.sliding_window)
    output = handle.attend(query, key, value, options, dense=dense, whole=whole, causal=causal)
    return output.transpose(1, 2).contiguous(), None


def _tell_of_restarts(kind: str, position_ids: Tensor | None) -> None:
    """Say it if documents that were packed into a row see each other."""
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


def _flag(module: Any, is_causal: bool | None) -> bool:
    """Whether a call without a mask is causal: as it says itself, else as its module does."""
    return bool(getattr(module, "is_causal", False)) if is_causal is None else bool(is_causal)


def _shows_no_later_key(
    handle: PrunableAttention, flag: bool, mask: Tensor | None, window: int | None, q_len: int, kv_len: int
) -> bool:
    """Whether a call is causal: a flag is a claim, which holds where no mask of all pairs stands against it."""
    if window is not None:
        return True
    if mask is None or mask.dim() == 2:
        return flag or (q_len == 1 and handle.causal)
    if torch.compiler.is_compiling():  # a tracer cannot look into the mask
        return handle.causal
    return hides_future(mask, q_len, kv_len) if mask.shape[-1] == kv_len else handle.causal


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
        seed=int(torch.randint(2**62, ())) if dropout else None,
        softcap=softcap,
    )


def _refuse_arguments(name: str, kwargs: dict[str, Any], refused: Iterable[str]) -> None:
    """What cannot be respected must not be dropped in silence."""
    for argument in refused:
        if kwargs.get(argument) is not None:
            raise ValueError(
                f"Layer {name!r} uses {_REFUSED[argument]} (`{argument}`), which pruning does not support. "
                "Prune another model."
            )


def _refuse_bias(handle: PrunableAttention, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool and not tells_documents(mask):
        raise ValueError(
            f"Layer {handle.name!r} must get an attention mask that only hides keys, got one of {mask.dtype} that "
            "adds a bias. Set `example_input_array` on the LightningModule: the layer is then left dense."
        )
