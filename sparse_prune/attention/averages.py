"""Averages of a model's weights inside the same module (EMA, SWA), which use the patterns of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_prune.attention.handles import handles_in, holds, modules_of, share_handle
from sparse_prune.attention.prefixes import renamings


def averaged_layers(modules: Mapping[str, nn.Module], layers: Collection[str]) -> dict[str, str]:
    """Map each layer inside an `AveragedModel` to the layer whose weights it averages.

    The averaged model is the one that has all of the average's layers under one other prefix; ambiguous averages are
    left out.
    """
    insides = [f"{name}.module".lstrip(".") for name, module in modules.items() if isinstance(module, AveragedModel)]
    free = {name for name in layers if not any(holds(inside, name) for inside in insides)}
    found: dict[str, str] = {}
    for inside in insides:
        ways = renamings([name for name in layers if holds(inside, name)], free)
        fitting = [names for (cut, _), names in ways.items() if f"{inside}.".startswith(cut)]
        found |= fitting[0] if len(fitting) == 1 else {}
    return found


def likely_copies(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Map layers that were never called to called ones whose names differ by one prefix; empty unless all have one."""
    ways = list(renamings(names, others).values())
    return ways[0] if len(ways) == 1 else {}


def share_with_averages(model: nn.Module) -> None:
    """Give averages that were copied from attached layers, as during training, the handles of these layers."""
    modules = modules_of(model)
    for copy, own in averaged_layers(modules, handles_in(model)).items():
        share_handle(modules[own], modules[copy])
