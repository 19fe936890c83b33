"""The pruned model of a checkpoint, without a Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from sparse_prune.kernels import usable_backend
from sparse_prune.pattern import BlockPattern
from sparse_prune.pruner import AttentionPruner
from sparse_prune.schedules import ConstantSchedule

_META = "meta.pt"
"""Where Lightning puts all but the tensors of a checkpoint that is a folder, as FSDP writes it."""


def restore_patterns(
    pl_module: pl.LightningModule,
    path: str | os.PathLike[str],
    *,
    module: str | None = None,
    weights_only: bool = True,
) -> dict[str, BlockPattern]:
    """Put a checkpoint's patterns on a module, which `load_from_checkpoint` leaves dense: it loads weights alone.

    Layers compute as they did when the checkpoint was written, with `gather` in the place of `triton` where there is no
    GPU. To train on, pass `ckpt_path` to the Trainer instead.

    Args:
        pl_module: With the model, its weights loaded.
        path: A checkpoint of a run with `AttentionPruning`: a file, or a folder as FSDP writes it.
        module: As in that `AttentionPruning`.
        weights_only: Unpickle plain types alone, as in `torch.load`. False runs whatever code the file holds: for
            checkpoints of your own, with hyperparameters of other types.

    Returns:
        Layer -> pattern; empty if nothing had been decided when the checkpoint was written.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it holds no pruning, or that of another model.
    """
    state = _pruning_state(Path(path), weights_only)
    # Of a pruner that decides nothing any more, the schedule does not matter.
    pruner = AttentionPruner(ConstantSchedule(final=0.0), block_size=tuple(state["block_size"]))
    pruner.attach(pl_module, module)
    pruner.load_state_dict(state)
    for layer in (state.layer for state in pruner.layers.values()):
        layer.backend = usable_backend(layer.backend)
    return pruner.patterns


def _pruning_state(path: Path, weights_only: bool) -> dict[str, Any]:
    file = path / _META if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be a checkpoint, got {str(path)!r}, which is none. Check the path.")
    callbacks = torch.load(file, map_location="cpu", weights_only=weights_only).get("callbacks", {})
    # States are under their classes' names, and a subclass has one of its own.
    found = [
        state["pruner"] for state in callbacks.values() if isinstance(state, dict) and _of_pruner(state.get("pruner"))
    ]
    if not found:
        raise ValueError(
            f"`path` must be a checkpoint of a run with AttentionPruning, got {str(path)!r} with the callbacks "
            f"{sorted(callbacks)}. Patterns of a pattern file: `load_patterns` and `apply_patterns`."
        )
    state: dict[str, Any] = found[0]
    return state


def _of_pruner(state: object) -> bool:
    """Whether this is what `AttentionPruner.state_dict` gives."""
    return isinstance(state, dict) and {"version", "block_size", "layers"} <= state.keys()
