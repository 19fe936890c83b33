"""Replaces the `forward` of one module; parameters, hooks and class stay, and it copies and pickles with the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from sparse_prune.attention.handles import handle_of


class _Replacement(partial[Any]):
    """A `forward` of ours, recognised by its class: (function, module, own)."""


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Route the module's calls to `function(module, own, ...)`, a function of a Python module.

    `own` is a `forward` that someone else has put on the instance, or None, for `run_original`. Hooks of accelerate,
    which keep the `forward` that they run, stay around it.

    Raises:
        ValueError: If the module's calls do not reach the function.
    """
    if not any(replaced(module, function, seat) for seat in _SEATS):
        seat = _seat(module)
        vars(module)[seat] = _Replacement(function, module, vars(module).get(seat))
    if not replaced(module, function):
        raise ValueError(
            f"`model` must have modules whose `forward` can be replaced on the instance, got {type(module).__name__}, "
            f"which still calls {module.forward!r}. Attach before the model is wrapped."
        )


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`."""
    for seat in _SEATS:
        replacement = vars(module).get(seat)
        if isinstance(replacement, _Replacement):
            own = replacement.args[1]
            if seat == "forward" and (own is None or _is_bound(own, module)):
                del vars(module)[seat]
            else:
                vars(module)[seat] = MethodType(type(module).forward, module) if own is None else own


def run_original(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Run the forward pass as it was before `replace_forward`."""
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def routed(
    through: Callable[..., Any], module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """Run `through(module, own, handle, ...)`, or the original forward pass if there is no handle or it is idle."""
    layer = handle_of(module)
    if layer is None or not layer.traceable:
        return _routed_eagerly(through, module, own, layer, *args, **kwargs)
    return through(module, own, layer, *args, **kwargs)


def _routed(through: Any, module: nn.Module, own: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    if layer is None or layer.idle:
        return run_original(module, own, *args, **kwargs)
    return through(module, own, layer, *args, **kwargs)


_routed_eagerly = torch.compiler.disable(_routed)  # type: ignore[no-untyped-call, unused-ignore]


_SEATS = ("forward", "_old_forward")


def _seat(module: nn.Module) -> str:
    """Name the attribute that holds the module's forward: accelerate renames it when it adds a hook."""
    return "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"


def replaced(module: nn.Module, function: Callable[..., Any], seat: str | None = None) -> bool:
    """Whether `replace_forward` routes a module's calls to a function, in its `forward` or in the attribute `seat`."""
    found = vars(module).get(seat or _seat(module))
    return isinstance(found, _Replacement) and found.func is function and found.args[0] is module


def _is_bound(method: Any, module: nn.Module) -> bool:
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward
