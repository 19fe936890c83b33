"""Finds the modules that can call SDPA in the code of their classes, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.nn import functional as F

_NAME = "scaled_dot_product_attention"


def can_call_sdpa(module: nn.Module) -> bool:
    """Whether the module's forward, or a function or method that it uses, mentions SDPA, under whatever name.

    Attributes of the instance that are SDPA, wrap it or list it count too. Functions of torch and of this package do
    not count, nor do modules that the module calls.
    """
    forward = type(module).forward
    # The module of the function, not of the class: `fully_shard` puts modules into classes of its own.
    if not isinstance(forward, FunctionType) or forward.__module__.startswith("torch."):
        return False
    seen: set[CodeType] = set()
    return _mentions(forward, type(module), seen) or any(_is(v, type(module), seen) for v in vars(module).values())


def _is(value: Any, owner: type[nn.Module], seen: set[CodeType]) -> bool:
    """Whether a value is SDPA, a function that mentions it, a `partial` of one, or a collection with one of these."""
    if value is F.scaled_dot_product_attention:
        return True
    if isinstance(value, partial):
        return _is(value.func, owner, seen)
    if isinstance(value, Mapping):
        return any(_is(part, owner, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_is(part, owner, seen) for part in value)
    return isinstance(value, FunctionType) and _mentions(value, owner, seen)


def _mentions(function: FunctionType, owner: type[nn.Module], seen: set[CodeType]) -> bool:
    # Our own functions stand in registries that models refer to.
    if function.__code__ in seen or function.__module__.startswith(("torch.", "sparse_prune.")):
        return False
    seen.add(function.__code__)
    names = [name for name in _names(function.__code__) if not name.startswith("__")]  # no forward pass builds itself
    for name in names:
        used: list[Any] = [function.__globals__.get(name, getattr(owner, name, None))]
        if "super" in names:
            used += [vars(base).get(name) for base in owner.__mro__]
        if name == _NAME or _is(used, owner, seen):
            return True
    return any(_mentions(enclosed, owner, seen) for enclosed in _enclosed(function))


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes that code uses, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _enclosed(function: Callable[..., Any]) -> Iterator[FunctionType]:
    for cell in getattr(function, "__closure__", None) or ():
        if isinstance(cell.cell_contents, FunctionType):
            yield cell.cell_contents
