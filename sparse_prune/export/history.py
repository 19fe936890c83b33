"""Patterns over the steps of a run, kept beside its logs: what the report animates."""

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
    """Write the patterns in force after a step, whole or not at all; a bit per block.

    Args:
        patterns: Layer -> pattern.
        folder: The run's folder; frames go into `pattern_history` inside.
        step: Optimizer steps taken.

    Returns:
        The file's path.
    """
    target = _path(folder, step)
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in encode(patterns).items()}
    with whole_file(target) as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)
    return target


def remove_frames(folder: Path, after: int) -> None:
    """Make room for what happens from a step on: those frames are of another run, or of one that was given up.

    Args:
        folder: The run's folder.
        after: Optimizer steps taken; later frames go.
    """
    for step in frame_steps(folder):
        if step > after:
            _path(folder, step).unlink()


def frame_steps(folder: Path) -> list[int]:
    """The steps of which there are frames, ascending; none if the run kept no history.

    Args:
        folder: The run's folder.
    """
    return sorted(int(path.stem.removeprefix("step_")) for path in (folder / FOLDER).glob("step_*.npz"))


def load_frame(folder: Path, step: int) -> dict[str, BlockPattern]:
    """The patterns of one frame, by layer.

    Args:
        folder: The run's folder.
        step: One of `frame_steps`.

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
