"""Patterns over the steps of a run, kept beside its logs: what the report animates."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from sparse_prune.files import whole_file
from sparse_prune.packing import pack, unpack
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
    arrays = {}
    for name, pattern in patterns.items():
        shape = (*pattern.keep.shape, *pattern.block_size, int(pattern.causal), pattern.q_len, pattern.kv_len)
        arrays[f"{name}:bits"] = pack(pattern.keep)["bits"].numpy()
        arrays[f"{name}:shape"] = np.asarray(shape, dtype=np.int64)
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
            names = [key.removesuffix(":shape") for key in stored.files if key.endswith(":shape")]
            return {name: _pattern(stored[f"{name}:bits"], stored[f"{name}:shape"].tolist()) for name in names}
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a frame of the pattern history, got {error!r}. Remove it.") from error


def _path(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"step_{step:08d}.npz"


def _pattern(bits: np.ndarray[tuple[int], np.dtype[np.uint8]], shape: list[int]) -> BlockPattern:
    heads, rows, cols, block_q, block_kv, causal, q_len, kv_len = shape
    keep = unpack({"shape": (heads, rows, cols), "bits": torch.from_numpy(bits)})
    return BlockPattern(keep, (block_q, block_kv), bool(causal), q_len, kv_len)
