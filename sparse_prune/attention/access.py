"""The front of attention access: finds the layers of a model, whatever their kind, and takes them over."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from sparse_prune.attention import hf, mha, sdpa
from sparse_prune.attention.found import FoundLayer, handle_of, holds, modules_of
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.trial import observing, run_example

log = logging.getLogger(__name__)


def list_layers(model: nn.Module, example: Any = None) -> list[FoundLayer]:
    """Every attention layer of a model, with the reason where its connections cannot be pruned.

    Args:
        model: Any module.
        example: An input: a tuple of arguments, a dict of keyword arguments, or the only argument. None: the model's
            `example_input_array`, if it has one, as LightningModules do. The model runs on it once, in eval mode, if
            it holds layers that were not taken over yet. Without an example, modules that call SDPA are tried alone,
            `nn.MultiheadAttention` is taken for bidirectional self-attention, and a bias that a transformers layer
            adds to its mask is not seen before training.

    Raises:
        ValueError: If the model does not take the example.
    """
    modules = modules_of(model)
    found = list(hf.find(modules))
    usable = [layer.module for layer in found if layer.problem is None]
    mhas = mha.candidates(model)
    callers = {name: module for name, module in sdpa.candidates(model).items() if not hf.is_attention(type(module))}
    example = getattr(model, "example_input_array", None) if example is None else example
    known = [*usable, *mhas.values(), *callers.values()]
    if example is None or (known and all(handle_of(module) is not None for module in known)):
        found += [*mha.find(mhas, None), *sdpa.find(callers, None)]
    else:
        with hf.observing(model) as hf_calls, mha.observing(model) as mha_calls, observing(model) as sdpa_calls:
            run_example(model, example)
        # However a module names SDPA, its call was seen.
        names = [name for name in modules if name in callers or name in sdpa_calls.keys() - mhas.keys()]
        callers = {name: modules[name] for name in names if not hf.is_attention(type(modules[name]))}
        found = [*hf.find(modules, hf_calls), *mha.find(mhas, mha_calls), *sdpa.find(callers, sdpa_calls)]
    found += _unreached(modules, [layer.name for layer in found], tried=example is not None)
    order = {name: index for index, name in enumerate(modules)}
    return sorted(found, key=lambda layer: order[layer.name])


def find_layers(model: nn.Module, example: Any = None) -> dict[str, nn.Module]:
    """Attention modules whose connections can be pruned, by qualified name.

    Args:
        model: Any module.
        example: An input, as in `list_layers`.

    Raises:
        ValueError: If the model does not take the example.
    """
    return {layer.name: layer.module for layer in list_layers(model, example) if layer.problem is None}


def attach(model: nn.Module, example: Any = None, *, module: str | None = None) -> list[PrunableAttention]:
    """Take over every self-attention layer that can be pruned; the model computes what it did.

    Calling it again returns the handles that are already there.

    Args:
        model: Any module.
        example: See `list_layers`.
        module: Qualified name of the module inside `model` whose layers are taken over; None: all layers are.

    Raises:
        ValueError: If there is no attention layer that can be pruned; the message lists what was found. If there is no
            such `module`.
    """
    if module is not None and module not in modules_of(model):
        raise ValueError(
            f"`module` must name a module of {type(model).__name__}, got {module!r}. Its children are "
            f"{[name for name, _ in model.named_children()]}."
        )
    layers = [layer for layer in list_layers(model, example) if holds(module or "", layer.name)]
    problems = [f"{layer.name!r}: {layer.problem}" for layer in layers if layer.problem is not None]
    usable = [layer for layer in layers if layer.problem is None]
    if not usable:
        raise ValueError(
            "`model` must contain self-attention that can be pruned, got "
            f"{type(model).__name__} with {'; '.join(problems[:8]) or 'no attention layers'}. Use a model whose "
            "attention goes through transformers' AttentionInterface, nn.MultiheadAttention or "
            "F.scaled_dot_product_attention."
        )
    if problems and any(handle_of(layer.module) is None for layer in usable):
        log.warning(
            "These attention layers stay dense: %s. Totals speak of the other %d of %d.",
            "; ".join(problems),
            len(usable),
            len(layers),
        )
    kinds = {kind: [layer for layer in usable if layer.kind == kind] for kind in ("transformers", "mha", "sdpa")}
    handles: dict[FoundLayer, PrunableAttention] = {}
    for kind, attach_layers in (("transformers", hf.attach), ("mha", mha.attach), ("sdpa", sdpa.attach)):
        if kinds[kind]:
            handles.update(zip(kinds[kind], attach_layers(model, kinds[kind]), strict=True))
    return [handles[layer] for layer in usable]


def detach(model: nn.Module) -> None:
    """Give every layer its own attention back.

    Args:
        model: As it was given to `attach`. One that was not taken over stays as it is.
    """
    if any(hf.is_attention(type(module)) and handle_of(module) is not None for module in model.modules()):
        hf.detach(model)
    mha.detach(model)
    sdpa.detach(model)


def _unreached(modules: dict[str, nn.Module], found: list[str], tried: bool) -> list[FoundLayer]:
    """Modules that are called attention, the innermost of them, and were not found in any way."""
    named = [name for name, module in modules.items() if re.search("att(ention|n)", type(module).__name__.lower())]
    problem = "computes attention in its own code, without SDPA or the AttentionInterface"
    if not tried:
        problem += ", as far as can be told without an example input"
    return [
        FoundLayer(name, "unknown", modules[name], problem=problem)
        for name in named
        if not any(holds(name, other) for other in named if other != name)
        and not any(holds(name, other) or holds(other, name) for other in found)
    ]
