"""The patterns of a run, step by step, beside its logs: the report animates them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from sparse_prune.codec import decode, encode
from sparse_prune.files import whole_file
from sparse_prune.pattern import BlockPattern

FOLDER = "pattern_history"


def save_frame(patterns: Mapping[str, BlockPattern], folder: Path, step: int) -> Path:
    """Write the patterns (by layer) that are in force after so many optimizer steps, a bit per block.

    The frame goes into `pattern_history` inside the run's folder, whole or not at all. Returns its path.
    """
    target = _path(folder, step)
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in encode(patterns).items()}
    with whole_file(target) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)
    return target


def remove_frames(folder: Path, after: int) -> None:
    """Remove the frames after a step: they are of another run, or of one that was given up."""
    for step in frame_steps(folder):
        if step > after:
            _path(folder, step).unlink()


def frame_steps(folder: Path) -> list[int]:
    """List the steps of which the run's folder holds frames, ascending; none if the run kept no history."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (folder / FOLDER).glob("step_*.npz"))


def load_frame(folder: Path, step: int) -> dict[str, BlockPattern]:
    """Read the patterns of one of the `frame_steps`, by layer.

    Raises:
        ValueError: If the frame is damaged; the message names the file.
    """
    path = _path(folder, step)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return decode({key: torch.from_numpy(array) for key, array in stored.items()})
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a frame of the pattern history, got {error!r}. Remove it.") from error


def _path(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step_{step:08d}.npz"
