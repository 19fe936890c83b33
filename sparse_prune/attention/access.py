"""Finds the attention layers of a model, of every family, and attaches to them."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from typing import Any

from torch import nn

from sparse_prune.attention.averages import averaged_layers
from sparse_prune.attention.families import FAMILIES
from sparse_prune.attention.handles import (
    FoundLayer,
    drop_handle,
    give_handle,
    handle_of,
    holds,
    modules_of,
    share_handle,
)
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.trial_run import TrialCalls, run_example

log = logging.getLogger(__name__)


def list_layers(model: nn.Module, example: Any = None) -> list[FoundLayer]:
    """List all attention layers of a model, with the reason if one cannot be pruned.

    Args:
        model: Any module.
        example: An input: a tuple of arguments, a dict of keyword arguments, or the only argument. None: the model's
            `example_input_array`, if it has one, as LightningModules do. The model runs on it once, in eval mode, if
            it has layers that are not attached yet. Without an example, modules that call SDPA are run alone,
            `nn.MultiheadAttention` is taken for bidirectional self-attention, and a bias that a transformers layer
            adds to its mask is not seen before training.

    Raises:
        ValueError: If the model does not take the example.
    """
    modules = modules_of(model)
    calls: list[TrialCalls | None] = [None] * len(FAMILIES)
    example = getattr(model, "example_input_array", None) if example is None else example
    if example is not None and not _all_attached(modules):
        with ExitStack() as stack:
            calls = [stack.enter_context(family.observing(model)) for family in FAMILIES]
            run_example(model, example)
    found: list[FoundLayer] = []
    for family, names, made in zip(FAMILIES, _claims(modules, calls), calls, strict=True):
        found += family.find(modules, names, made)
    found += _unreached(modules, [layer.name for layer in found], tried=example is not None)
    order = {name: index for index, name in enumerate(modules)}
    return sorted(found, key=lambda layer: order[layer.name])


def _claims(modules: dict[str, nn.Module], calls: list[TrialCalls | None]) -> list[list[str]]:
    """Assign modules to families: candidates and those whose calls were seen, to the first family that claims them."""
    free, claims = dict(modules), []
    for family, made in zip(FAMILIES, calls, strict=True):
        mine = {*family.candidates(free), *(made or ())}
        claims.append([name for name in free if name in mine])
        free = {name: module for name, module in free.items() if name not in mine}
    return claims


def _all_attached(modules: dict[str, nn.Module]) -> bool:
    """Whether there are layers and all prunable ones have handles."""
    open_ = [
        modules[name]
        for family, names in zip(FAMILIES, _claims(modules, [None] * len(FAMILIES)), strict=True)
        for name in names
        if family.refused(name, modules[name]) is None
    ]
    return bool(open_) and all(handle_of(module) is not None for module in open_)


def find_layers(model: nn.Module, example: Any = None) -> dict[str, nn.Module]:
    """Return the attention modules that can be pruned, by qualified name; arguments and errors as in `list_layers`."""
    return {layer.name: layer.module for layer in list_layers(model, example) if layer.problem is None}


def attach(model: nn.Module, example: Any = None, *, module: str | None = None) -> list[PrunableAttention]:
    """Attach to every self-attention layer that can be pruned; the model's outputs do not change.

    Calling it again returns the existing handles. Layers of an `AveragedModel` inside `model` get the handles of the
    layers that they average.

    Args:
        model: Any module.
        example: See `list_layers`.
        module: Qualified name of the module inside `model` whose layers are attached; None: all layers.

    Raises:
        ValueError: If no attention layer can be pruned (the message lists what was found), or there is no such
            `module`.
    """
    if module is not None and module not in modules_of(model):
        raise ValueError(
            f"`module` must name a module of {type(model).__name__}, got {module!r}. Its children are "
            f"{[name for name, _ in model.named_children()]}."
        )
    every = list_layers(model, example)
    averages = averaged_layers(modules_of(model), [layer.name for layer in every])
    layers = [layer for layer in every if layer.name not in averages and holds(module or "", layer.name)]
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
            "These attention layers stay dense: %s. Totals count the other %d of %d.",
            "; ".join(problems),
            len(usable),
            len(layers),
        )
    handles = [give_handle(layer) for layer in usable]
    own = {layer.name: layer.module for layer in usable}
    copies = [layer for layer in every if averages.get(layer.name) in own]
    for copy in copies:
        share_handle(own[averages[copy.name]], copy.module)
    for family in FAMILIES:
        mine = [layer for layer in (*usable, *copies) if layer.kind == family.KIND]
        if mine:
            family.attach(model, mine)
    return handles


def detach(model: nn.Module) -> None:
    """Undo `attach`: every layer computes by its own attention again. A model that is not attached stays as it is."""
    for family in FAMILIES:
        family.detach(model)
    for module in model.modules():
        drop_handle(module)


def _unreached(modules: dict[str, nn.Module], found: list[str], tried: bool) -> list[FoundLayer]:
    """List the innermost modules that are called attention and that no family found."""
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
