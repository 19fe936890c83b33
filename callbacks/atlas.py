"""Patterns as pictures: one layer with its heads side by side, or a whole model as one atlas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparse_prune.pattern import BlockPattern

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""(height, width, 3), RGB."""

PAPER = (255, 255, 255)
PRUNED = (226, 230, 238)
KEPT_WEAK = (150, 186, 224)
KEPT = (29, 78, 137)
KEPT_STRONG = (8, 32, 72)
REGROWN = (240, 150, 40)
LOST = (222, 120, 140)
LEAST = 1e-12
"""Scores below it look like it: the colour scale is logarithmic."""

LEGEND = (
    "A column per layer, a row per head; in each, query blocks downwards, key blocks to the right. "
    "Blue: kept, the darker the higher the score. Grey: pruned. Orange: regrown, pink: pruned since the last picture."
)


@dataclass(frozen=True)
class LayerView:
    """What the atlas shows of a layer."""

    pattern: BlockPattern
    scores: Tensor | None = None
    """(num_heads, q_blocks, kv_blocks); None: all kept blocks look alike."""
    before: Tensor | None = None
    """The keep mask of the last picture, (num_heads, q_blocks, kv_blocks); None or another shape: nothing is marked."""


def draw_atlas(layers: Sequence[LayerView], pixels: int = 2, gap: int = 2) -> Picture:
    """A model as one picture, a column per layer and a row per head.

    Args:
        layers: In the order of the model. They may have different numbers of heads and blocks.
        pixels: Side of a block.
        gap: Pixels between heads.
    """
    if not layers:
        return np.full((1, 1, 3), 255, dtype=np.uint8)
    heads = max(view.pattern.num_heads for view in layers)
    height = max(view.pattern.keep.shape[1] for view in layers) * pixels + gap
    width = max(view.pattern.keep.shape[2] for view in layers) * pixels + gap
    picture = np.full((heads * height - gap, len(layers) * width - gap, 3), 255, dtype=np.uint8)
    strengths = _strengths(layers)
    for x, (view, strength) in enumerate(zip(layers, strengths, strict=True)):
        for y, head in enumerate(_colours(view, strength)):
            tile = head.repeat(pixels, 0).repeat(pixels, 1)
            picture[y * height : y * height + tile.shape[0], x * width : x * width + tile.shape[1]] = tile
    return picture


def draw_layer(pattern: BlockPattern, pixels: int = 96) -> Picture:
    """Heads side by side; `pixels` is about the height."""
    scale = max(1, pixels // pattern.keep.shape[1])
    colours = _colours(LayerView(pattern), None).repeat(scale, 1).repeat(scale, 2)
    gap = np.full((colours.shape[1], 4, 3), 255, dtype=np.uint8)
    return np.concatenate([part for tile in colours for part in (tile, gap)][:-1], axis=1)


def views(
    patterns: Mapping[str, BlockPattern],
    scores: Mapping[str, Tensor] | None = None,
    before: Mapping[str, Tensor] | None = None,
) -> list[LayerView]:
    """Layers by name as the atlas takes them."""
    scores, before = scores or {}, before or {}
    return [LayerView(pattern, scores.get(name), before.get(name)) for name, pattern in patterns.items()]


def score_range(layers: Sequence[LayerView]) -> tuple[float, float] | None:
    """Lowest and highest score of a kept block: the ends of the colour scale. None where no scores are known."""
    kept = [v.scores.cpu()[v.pattern.keep].float().numpy() for v in layers if v.scores is not None and _fits(v)]
    known = np.concatenate([part[np.isfinite(part)] for part in kept]) if kept else np.zeros(0, dtype=np.float32)
    if not known.size:
        return None
    return max(float(known.min()), LEAST), max(float(known.max()), LEAST)


def _fits(view: LayerView) -> bool:
    return view.scores is not None and view.scores.shape == view.pattern.keep.shape


def _strengths(layers: Sequence[LayerView]) -> list[np.ndarray[Any, np.dtype[np.float32]] | None]:
    """Scores on one scale for the whole picture, in [0, 1]: their logarithm between the kept blocks' extremes."""
    ends = score_range(layers)
    if ends is None:
        return [None] * len(layers)
    low, high = np.log(ends)
    span = max(high - low, 1e-6)
    return [
        np.clip((np.log(np.maximum(v.scores.float().cpu().numpy(), LEAST)) - low) / span, 0.0, 1.0).astype(np.float32)
        if v.scores is not None and _fits(v)
        else None
        for v in layers
    ]


def _colours(view: LayerView, strength: np.ndarray[Any, np.dtype[np.float32]] | None) -> Picture:
    """(num_heads, q_blocks, kv_blocks, 3)"""
    keep, possible = view.pattern.keep.numpy(), view.pattern.possible.numpy()
    colours = np.full((*keep.shape, 3), PAPER, dtype=np.uint8)
    colours[:, possible] = PRUNED
    if strength is None:
        colours[keep] = KEPT
    else:
        weak, strong = np.asarray(KEPT_WEAK, np.float32), np.asarray(KEPT_STRONG, np.float32)
        colours[keep] = (weak + strength[keep][:, None] * (strong - weak)).astype(np.uint8)
    if view.before is not None and view.before.shape == view.pattern.keep.shape:
        before = view.before.numpy()
        colours[keep & ~before] = REGROWN
        colours[~keep & before & possible] = LOST
    return colours
