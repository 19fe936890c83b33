"""Averages of a model's weights inside the same module (EMA, SWA), which use the patterns of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_prune.attention.handles import handle_of, holds, modules_of, share_handle


def averaged_layers(modules: Mapping[str, nn.Module], layers: Collection[str]) -> dict[str, str]:
    """Map each layer inside an `AveragedModel` to the layer whose weights it averages.

    Args:
        modules: All modules of a model, by qualified name.
        layers: Names of its attention layers. The averaged model is the one that has all of the average's layers under
            one other prefix; ambiguous averages are left out.
    """
    insides = [f"{name}.module".lstrip(".") for name, module in modules.items() if isinstance(module, AveragedModel)]
    free = {name for name in layers if not any(holds(inside, name) for inside in insides)}
    found: dict[str, str] = {}
    for inside in insides:
        rests = [name.removeprefix(f"{inside}.") for name in layers if holds(inside, name)]
        way = _elsewhere(rests, free)
        found |= {} if way is None else {f"{inside}.{rest}": way + rest for rest in rests}
    return found


def likely_copies(names: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Map layers to others whose names differ by one prefix alone; empty unless all of them have such a twin.

    Args:
        names: Names of layers that were never called.
        others: Names of layers that were called.
    """
    parts = [name.split(".") for name in names]
    for depth in range(1, min(map(len, parts), default=0)):
        if len({tuple(part[:depth]) for part in parts}) > 1:
            return {}
        rests = [".".join(part[depth:]) for part in parts]
        way = _elsewhere(rests, others)
        if way is not None:
            return {name: way + rest for name, rest in zip(names, rests, strict=True)}
    return {}


def _elsewhere(rests: list[str], names: Collection[str]) -> str | None:
    """The only prefix under which all of `rests` are names; None if there is none or several."""
    ways = {name.removesuffix(rests[0]) for name in names if f".{name}".endswith(f".{rests[0]}")} if rests else set()
    fitting = [way for way in ways if {way + rest for rest in rests} <= set(names)]
    return fitting[0] if len(fitting) == 1 else None


def share_with_averages(model: nn.Module) -> None:
    """Give averages that were copied from attached layers, as during training, the handles of these layers.

    Args:
        model: Any module.
    """
    modules = modules_of(model)
    attached = [name for name, module in modules.items() if handle_of(module) is not None]
    for copy, own in averaged_layers(modules, attached).items():
        share_handle(modules[own], modules[copy])
