"""Configs of transformers models that were taken over: what they say while they are, and what travels in a pickle.

The attention functions have their names in this process alone. So a pickle of a config, as `save_hyperparameters` makes
it, names the attention that the model had before. Layers that are pickled with it take it over again where they are
loaded.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any
from weakref import ref

_BEFORE: dict[int, tuple[ref[Any], str | None]] = {}  # configs cannot be hashed


def set_implementation(config: Any, implementation: str, before: str | None) -> None:
    """Let a config name another attention, of which its pickles and copies say nothing.

    Args:
        config: Of a transformers model.
        implementation: The attention to name.
        before: The one that pickles name.
    """
    key = id(config)
    _BEFORE[key] = ref(config, lambda _: _BEFORE.pop(key, None)), before
    copyreg.pickle(type(config), _reduce)
    # Not by `set_attn_implementation`, which goes on to the configs of other models inside.
    config._attn_implementation_internal = implementation


def give_back(config: Any, implementation: str | None) -> None:
    """Let a config name the attention that it named before."""
    _BEFORE.pop(id(config), None)
    config._attn_implementation_internal = implementation


class TakeOver:
    """Takes a config over, once more where the handle that holds this was copied or loaded.

    Args:
        config: Of the handle's module.
        implementation: The attention that it names.
        before: The one that it named before.
        register: Lets this process find the attention by its name.
    """

    def __init__(self, config: Any, implementation: str, before: str | None, register: Callable[[], None]) -> None:
        self.config, self.implementation, self.before, self.register = config, implementation, before, register

    def __call__(self) -> None:
        self.register()
        set_implementation(self.config, self.implementation, self.before)


def _reduce(config: Any) -> Any:
    reduced = config.__reduce_ex__(2)
    known = _BEFORE.get(id(config))
    if known is None or known[0]() is not config or not isinstance(reduced[2], dict):
        return reduced
    return (*reduced[:2], reduced[2] | {"_attn_implementation_internal": known[1]}, *reduced[3:])
