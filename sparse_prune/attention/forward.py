"""Another `forward` on one module: parameters, hooks and class stay; copies and pickles with the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def replace_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let the module's calls go to `function(module, own, ...)`, a function of a Python module.

    `own` is a `forward` that someone else has put on the instance, else None; `run_original` takes it.
    """
    if not _is_replaced(module):
        vars(module)["forward"] = partial(function, module, vars(module).get("forward"))


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`."""
    if _is_replaced(module):
        own = vars(module).pop("forward").args[1]
        if own is not None:
            vars(module)["forward"] = own


def run_original(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward pass as it was before `replace_forward`."""
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def _is_replaced(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.args[:1] == (module,)
