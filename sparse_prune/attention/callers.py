"""Which modules can call SDPA, read from the code of their class without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

_NAME = "scaled_dot_product_attention"


def can_call_sdpa(module: nn.Module) -> bool:
    """Whether the module's forward, or a function or method that it uses, mentions SDPA, under whatever name.

    Modules of torch itself are not looked at, nor those that the module calls.
    """
    forward = type(module).forward
    # The module of the function, not of the class: `fully_shard` puts modules into classes of its own.
    if not isinstance(forward, FunctionType) or forward.__module__.startswith("torch."):
        return False
    own = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    return _mentions(forward, type(module), set()) or any(_mentions(f, type(module), set()) for f in own)


def _mentions(function: FunctionType, owner: type[nn.Module], seen: set[CodeType]) -> bool:
    if function.__code__ in seen or function.__module__.startswith("torch."):
        return False
    seen.add(function.__code__)
    for name in _names(function.__code__):
        used: Any = function.__globals__.get(name, getattr(owner, name, None))
        if name == _NAME or used is F.scaled_dot_product_attention:
            return True
        if isinstance(used, FunctionType) and _mentions(used, owner, seen):
            return True
    return any(_mentions(enclosed, owner, seen) for enclosed in _enclosed(function))


def _names(code: CodeType) -> Iterator[str]:
    """Globals and attributes that code uses, functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _enclosed(function: Callable[..., Any]) -> Iterator[FunctionType]:
    for cell in getattr(function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, FunctionType):
            yield cell.cell_contents
