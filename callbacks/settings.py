"""The settings of pruning as hyperparameters for loggers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from sparse_prune.pruner import AttentionPruner


def pruning_settings(pruner: AttentionPruner, **others: Any) -> dict[str, Any]:
    """Return settings as flat plain values under "pruning/", such as "pruning/sparsity/final", to sort sweeps by.

    Args:
        pruner: The pruner, with its schedule as it was given.
        **others: More settings; dataclasses are flattened.
    """
    return _flat("pruning", pruner) | {
        name: value for key, given in others.items() for name, value in _flat(f"pruning/{key}", given).items()
    }


def _flat(key: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        kind = {} if isinstance(value, AttentionPruner) else {key: type(value).__name__}
        parts = (_flat(f"{key}/{part.name}", getattr(value, part.name)) for part in fields(value) if part.init)
        return {name: found for part in (kind, *parts) for name, found in part.items()}
    return {key: value if value is None or isinstance(value, bool | int | float | str) else str(value)}
