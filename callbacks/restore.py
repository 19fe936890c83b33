"""Restores the patterns of a checkpoint without a Trainer."""

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
"""The file of everything but weights in a sharded checkpoint, which is a folder (FSDP)."""


def restore_patterns(
    pl_module: pl.LightningModule,
    path: str | os.PathLike[str],
    *,
    module: str | None = None,
    weights_only: bool = True,
) -> dict[str, BlockPattern]:
    """Restore a checkpoint's patterns on a module; `load_from_checkpoint` loads weights alone and leaves it dense.

    Layers compute as they did when the checkpoint was written, with `gather` instead of `triton` if there is no GPU. To
    continue training, pass `ckpt_path` to the Trainer instead.

    Args:
        pl_module: The module with the model, after its weights were loaded.
        path: A checkpoint of a run with `AttentionPruning`: a file, or a folder as FSDP writes it.
        module: The `module` of that `AttentionPruning`.
        weights_only: Unpickle plain types alone, as in `torch.load`. False runs whatever code the file holds: for
            checkpoints of your own, with hyperparameters of other types.

    Returns:
        Layer -> pattern; empty if the checkpoint was written before the first decision.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it holds no pruning, or that of another model.
    """
    state = _pruning_state(Path(path), weights_only)
    # This pruner makes no decisions, so its schedule does not matter.
    pruner = AttentionPruner(ConstantSchedule(final=0.0), block_size=tuple(state["block_size"]))
    pruner.attach(pl_module, module)
    pruner.load_state_dict(state)
    for layer in (state.layer for state in pruner.layers.values()):
        layer.backend = usable_backend(layer.backend)
    return pruner.patterns


def _pruning_state(path: Path, weights_only: bool) -> dict[str, Any]:
    file = path / _META if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be a checkpoint, got {str(path)!r}, where none is. Check the path.")
    callbacks = torch.load(file, map_location="cpu", weights_only=weights_only).get("callbacks", {})
    # States stand under the names of their classes, which may be subclasses.
    found = [
        state["pruner"] for state in callbacks.values() if isinstance(state, dict) and _of_pruner(state.get("pruner"))
    ]
    if not found:
        raise ValueError(
            f"`path` must be a checkpoint of a run with AttentionPruning, got {str(path)!r} with the callbacks "
            f"{sorted(callbacks)}. Use `load_patterns` and `apply_patterns` for a pattern file."
        )
    state: dict[str, Any] = found[0]
    return state


def _of_pruner(state: object) -> bool:
    """Whether this is the state of an `AttentionPruner`."""
    return isinstance(state, dict) and {"version", "block_size", "layers"} <= state.keys()
