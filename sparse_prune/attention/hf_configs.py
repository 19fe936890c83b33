"""The attention implementation that the configs of attached transformers models name, here and in their pickles.

The attention functions are registered in this process alone. So a pickle of a config, as `save_hyperparameters` makes
it, names the implementation that the model had before. Layers that are pickled with it set ours again when loaded.
"""

from __future__ import annotations

import copyreg
from typing import Any
from weakref import ref

_BEFORE: dict[int, tuple[ref[Any], str | None]] = {}  # configs cannot be hashed


def set_implementation(config: Any, implementation: str, before: str | None) -> None:
    """Let a config name another attention implementation; its pickles and copies name the one before."""
    key = id(config)
    _BEFORE[key] = ref(config, lambda _: _BEFORE.pop(key, None)), before
    copyreg.pickle(type(config), _reduce)
    # `set_attn_implementation` would change the configs of inner models too.
    config._attn_implementation_internal = implementation


def restore_implementation(config: Any, implementation: str | None) -> None:
    """Let a config name the attention implementation that it named before."""
    _BEFORE.pop(id(config), None)
    config._attn_implementation_internal = implementation


def _reduce(config: Any) -> Any:
    reduced = config.__reduce_ex__(2)
    known = _BEFORE.get(id(config))
    if known is None or known[0]() is not config or not isinstance(reduced[2], dict):
        return reduced
    return (*reduced[:2], reduced[2] | {"_attn_implementation_internal": known[1]}, *reduced[3:])
