"""The settings of pruning as hyperparameters for loggers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from sparse_prune.pruner import AttentionPruner
from sparse_prune.schedules import Schedule

BLOCK_SIZE = "pruning/block_size"


def pruning_settings(pruner: AttentionPruner, schedule: Schedule, **others: Any) -> dict[str, Any]:
    """Return settings as flat plain values under "pruning/", such as "pruning/sparsity/final", to sort sweeps by.

    A block size that is not known yet is left out, because some loggers refuse to change a value.
    """
    given = replace(pruner)
    given.schedule = schedule  # as the user gave it
    parts = [_flat("pruning", given), *(_flat(f"pruning/{key}", value) for key, value in others.items())]
    found = {name: value for part in parts for name, value in part.items()}
    return {name: value for name, value in found.items() if name != BLOCK_SIZE or pruner.block_size is not None}


def _flat(key: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        kind = {} if isinstance(value, AttentionPruner) else {key: type(value).__name__}
        parts = (_flat(f"{key}/{part.name}", getattr(value, part.name)) for part in fields(value) if part.init)
        return {name: found for part in (kind, *parts) for name, found in part.items()}
    return {key: value if value is None or isinstance(value, bool | int | float | str) else str(value)}
