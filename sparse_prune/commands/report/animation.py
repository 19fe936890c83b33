"""Makes the animation of the page from the history of patterns: few and small frames, as text."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_prune.pattern import BlockPattern

MOST_FRAMES = 60
"""Frames that the animation shows; longer histories are thinned out."""
MOST_BYTES = 5_000_000
"""Bytes of the frames inside the page, about; if there are more, squares of blocks are merged into cells."""
MOST_CELLS = 2400
"""Cells along a side of the atlas; a screen shows no more."""
LEVELS = 4
"""Shades of a cell of several blocks: all pruned, up to a third of the possible ones kept, up to two thirds, more."""


def thin_out(steps: Sequence[int]) -> list[int]:
    """Choose at most `MOST_FRAMES` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= MOST_FRAMES:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (MOST_FRAMES - 1))] for i in range(MOST_FRAMES)]


def blocks_per_cell(patterns: Mapping[str, BlockPattern], frames: int) -> int:
    """Find the side, in blocks, of the smallest cells that keep frames below `MOST_BYTES` and `MOST_CELLS`."""
    shapes = [pattern.keep.shape for pattern in patterns.values()]
    most = max((max(shape[1:]) for shape in shapes), default=1)
    for merged in range(1, most):
        count = sum(heads * -(-rows // merged) * -(-cols // merged) for heads, rows, cols in shapes)
        side = max(len(shapes) * -(-most // merged), max(shape[0] for shape in shapes) * -(-most // merged))
        if frames * count * _depth(merged) / 8 * 4 / 3 <= MOST_BYTES and side <= MOST_CELLS:
            return merged
    return most


def cells(pattern: BlockPattern, merged: int) -> dict[str, Any]:
    """Describe a layer of a frame as JSON types.

    Returns:
        heads, rows and cols of cells; `depth`, bits per cell; `keep`, levels of cells from the first head's first row
        on, the highest bit first; `possible`, a bit per cell of one head. Both are base64.
    """
    kept, possible = _sums(pattern.keep, merged), _sums(pattern.possible[None], merged)[0]
    depth = _depth(merged)
    levels = ((2**depth - 1) * kept / possible.clamp(min=1)).ceil().to(torch.uint8).numpy()
    bits = levels[..., None] >> np.arange(depth)[::-1] & 1
    heads, rows, cols = kept.shape
    return {
        "heads": heads, "rows": rows, "cols": cols, "depth": depth,
        "keep": _text(bits), "possible": _text((possible > 0).numpy()),
    }  # fmt: skip


def frames(history: Iterator[tuple[int, Mapping[str, BlockPattern]]], merged: int) -> list[dict[str, Any]]:
    """Describe frames as JSON types; only one is held at full size at a time."""
    return [{"step": step, "layers": [cells(p, merged) for p in patterns.values()]} for step, patterns in history]


def _depth(merged: int) -> int:
    return 1 if merged == 1 else (LEVELS - 1).bit_length()


def _sums(blocks: Tensor, merged: int) -> Tensor:
    """Count the blocks that are set in each cell, (heads, rows, cols) of cells."""
    heads, rows, cols = blocks.shape
    whole = pad(blocks.int(), (0, -cols % merged, 0, -rows % merged))
    return whole.view(heads, -(-rows // merged), merged, -(-cols // merged), merged).sum((2, 4))


def _text(bits: Any) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()
