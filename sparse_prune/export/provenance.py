"""Describes how patterns came about, for the header of their file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch

from sparse_prune.pruner import AttentionPruner


def describe_pruning(pruner: AttentionPruner, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Describe how patterns came about, for a header: schedule, settings and a summary of scores, as JSON types.

    Args:
        pruner: The pruner that made them.
        names: The pruner's name of a layer -> its name in the header. None: the same names.
    """
    schedule, names, scores, settled = pruner.schedule, names or {}, {}, {}
    for name, state in pruner.layers.items():
        settled[names.get(name, name)] = state.settled_at
        if state.layer.pattern is not None and not state.scores.empty:
            known = state.scores.value()
            # `quantile` takes 2 ** 24 values at most.
            known = known[known.isfinite()][: 2**24]
            marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
            scores[names.get(name, name)] = {
                "quartiles": known.quantile(marks).tolist() if known.numel() else [],
                "mass_kept": state.mass_kept,
            }
    return {
        "schedule": {
            "kind": type(schedule).__name__,
            "of": "sparsity" if pruner.sparsity is not None else "threshold",
            **(asdict(schedule) if is_dataclass(schedule) else {}),
        },
        "pruning": {
            "statistic": pruner.statistic,
            "criterion": pruner.criterion,
            "decay": pruner.decay,
            "block_size": list(pruner.block_size) if isinstance(pruner.block_size, tuple) else pruner.block_size,
            "constraints": asdict(pruner.constraints),
        },
        "settled_at": settled,
        "scores": scores,
    }
