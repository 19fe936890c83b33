"""Attention layers that call `F.scaled_dot_product_attention` themselves: timm, torchtune, hand-written models.

Their heads and causality are seen in a trial run of the whole model on an example, or of the module alone if it takes
one tensor: every library names attributes for them in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_prune.attention.forward import replace_forward, replaced, restore_forward, routed, run_original
from sparse_prune.attention.handles import FoundLayer, handle_of, modules_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.masks import is_bias, split
from sparse_prune.attention.sdpa_callers import can_call_sdpa
from sparse_prune.attention.trial_run import BIAS, TrialCall, TrialCalls, describe, run_example
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.dropout import draw_seed

KIND = "sdpa"
_LENGTH = 4  # tokens when a module is tried alone
_EXAMPLE = "Give an example input of the model (LightningModule.example_input_array, or `example`)."


def candidates(modules: Mapping[str, nn.Module]) -> Collection[str]:
    """Return the modules that can call SDPA, by their code, and those whose calls are routed already."""
    return [name for name, module in modules.items() if replaced(module, _forward) or can_call_sdpa(module)]


def refused(name: str, module: nn.Module) -> str | None:
    """Return None: nothing is known before a call."""
    return None


@contextmanager
def observing(model: nn.Module) -> Iterator[TrialCalls]:
    """Record calls of SDPA by the innermost module that makes them, complete at the end of the block."""
    calls: dict[str, list[TrialCall]] = {}
    running: list[tuple[str, list[TrialCall]]] = [("", [])]
    hooks = []
    for name, module in modules_of(model).items():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            running.append((name, []))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            name, made = running.pop()
            if made:
                calls[name] = made

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        running[-1][1].append(describe(*args, **kwargs))
        output: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        return output

    try:
        with _InPlaceOfSDPA(observed):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _InPlaceOfSDPA(TorchFunctionMode):
    """Calls a function in place of SDPA, however a module has imported SDPA."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.function if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def find(modules: Mapping[str, nn.Module], names: Collection[str], calls: TrialCalls | None) -> Iterator[FoundLayer]:
    """Describe modules that call SDPA; without a trial run of the model each is run alone."""
    for name in names:
        module, handle = modules[name], handle_of(modules[name])
        if handle is not None:
            yield FoundLayer(name, KIND, module, handle.num_heads, handle.num_kv_heads, handle.causal)
        elif calls is None:
            yield _try_alone(name, module)
        else:
            yield _found(name, module, calls.get(name, []), "it made no call of SDPA in the trial run")


def attach(model: nn.Module, layers: list[FoundLayer]) -> None:
    """Route the modules' calls of SDPA through their handles."""
    for layer in layers:
        replace_forward(layer.module, _forward)


def detach(model: nn.Module) -> None:
    """Undo `attach` for all modules."""
    for module in model.modules():
        if replaced(module, _forward):
            restore_forward(module)


def _try_alone(name: str, module: nn.Module) -> FoundLayer:
    first = next((child for child in module.modules() if isinstance(child, nn.Linear)), None)
    if first is None:
        return FoundLayer(name, KIND, module, problem=f"its input is not known. {_EXAMPLE}")
    example = first.weight.new_ones(1, _LENGTH, first.in_features)
    try:
        with observing(module) as calls:
            run_example(module, (example,))
    except ValueError as error:
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}".splitlines()[0]
        return FoundLayer(name, KIND, module, problem=f"cannot be run alone ({reason}). {_EXAMPLE}")
    return _found(name, module, calls.get("", []), f"it made no call of SDPA when run alone. {_EXAMPLE}", False)


def _found(name: str, module: nn.Module, calls: list[TrialCall], uncalled: str, seen: bool = True) -> FoundLayer:
    if not calls:
        return FoundLayer(name, KIND, module, problem=uncalled)
    call = calls[0]
    problem = call.problem if len(calls) == 1 else f"calls SDPA {len(calls)} times in one forward pass"
    heads = call.num_heads, call.num_kv_heads
    return FoundLayer(name, KIND, module, *heads, call.causal, problem=problem, seen=seen)


def _forward(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    return routed(_through, module, own, *args, **kwargs)


def _through(module: nn.Module, own: Any, layer: PrunableAttention, *args: Any, **kwargs: Any) -> Any:
    with _InPlaceOfSDPA(partial(attend, layer)):
        return run_original(module, own, *args, **kwargs)


def attend(
    layer: PrunableAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run `F.scaled_dot_product_attention` in the layer's mode.

    Raises:
        ValueError: If the call cannot be pruned, though others of the layer could.
    """

    def dense() -> Tensor:
        output: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return output

    q_len, kv_len = query.shape[2], key.shape[2]
    causal = call_is_causal(layer, q_len, kv_len, attn_mask, is_causal)
    key_mask, attn_mask_ = split(attn_mask, query.shape[0], kv_len)
    options = AttentionOptions(scale, key_mask, attn_mask_, dropout_p=dropout_p, seed=draw_seed(dropout_p))
    return layer.attend(query, key, value, options, dense=dense, causal=causal)


def call_is_causal(
    layer: PrunableAttention, q_len: int, kv_len: int, attn_mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether a call of SDPA hides later keys from every query, by the values of its mask or else by its flag.

    A layer whose first call cannot be pruned stays dense from then on.

    Raises:
        ValueError: If the call cannot be pruned, though others of the layer could.
    """
    if q_len != kv_len and (is_causal or torch.is_grad_enabled()):
        counted = " with is_causal=True, which SDPA counts from the first key" if is_causal else ""
        layer.refuse(f"cross-attention ({q_len} queries, {kv_len} keys{counted})")
    if attn_mask is not None and not torch.compiler.is_compiling() and is_bias(attn_mask):
        layer.refuse(BIAS)
    return layer.hides_later_keys(attn_mask, is_causal, q_len, kv_len)
