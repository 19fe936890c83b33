"""Pictures of patterns: one layer with its heads side by side, or the atlas of a whole model with its colour scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparse_prune.pattern import BlockPattern

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""(height, width, 3), RGB."""

PAPER = (255, 255, 255)
PRUNED = (226, 230, 238)
KEPT_WEAK = (150, 186, 224)
KEPT = (29, 78, 137)
KEPT_STRONG = (8, 32, 72)
REGROWN = (240, 150, 40)
LOST = (222, 120, 140)
LEVELS = 200
_RAMP = np.linspace(0.0, 1.0, LEVELS)[:, None]
PALETTE = np.concatenate(
    [(PAPER, PRUNED, KEPT, REGROWN, LOST), (1.0 - _RAMP) * KEPT_WEAK + _RAMP * KEPT_STRONG]
).astype(np.uint8)
"""Colours by number: those without a score, then `LEVELS` of kept blocks from the lowest score to the highest."""
LEAST = 1e-12
"""Lowest score of the logarithmic colour scale; lower ones get its colour."""
MOST_PIXELS = 2400
"""Longest side of a picture: with more blocks, squares of blocks are merged into pixels of their mean colour."""

LEGEND = (
    "A column per layer, a row per head; in each, query blocks downwards, key blocks to the right. "
    "Blue: kept, the darker the higher the score. Grey: pruned. Orange: regrown, pink: pruned since the last picture."
)
LEFT, TOP, BOTTOM = 30, 26, 44
"""Margins in pixels, for the numbers of heads, the numbers of layers, and the scale."""
LEAST_WIDTH = 680
"""Width of the scale in pixels."""
INK = (70, 80, 96)
SWATCHES = ((PRUNED, "pruned"), (REGROWN, "regrown"), (LOST, "pruned since the last picture"))


@dataclass(frozen=True)
class LayerView:
    """A layer in the atlas."""

    pattern: BlockPattern
    scores: Tensor | None = None
    """(num_heads, q_blocks, kv_blocks); None: all kept blocks look alike."""
    before: Tensor | None = None
    """The keep mask of the last picture, (num_heads, q_blocks, kv_blocks); None or another shape: nothing is marked."""


def draw_atlas(layers: Sequence[LayerView], pixels: int = 2, gap: int = 2) -> Picture:
    """Draw a model, a column per layer and a row per head; no side is longer than `MOST_PIXELS` if possible."""
    if not layers:
        return np.full((1, 1, 3), 255, dtype=np.uint8)
    heads = max(view.pattern.num_heads for view in layers)
    rows, cols = (max(view.pattern.keep.shape[side] for view in layers) for side in (1, 2))
    pixels, merged = _scale([(heads, rows), (len(layers), cols)], pixels, gap)
    height, width = -(-rows // merged) * pixels + gap, -(-cols // merged) * pixels + gap
    picture = np.full((heads * height - gap, len(layers) * width - gap, 3), 255, dtype=np.uint8)
    strengths = _strengths(layers)
    for x, (view, strength) in enumerate(zip(layers, strengths, strict=True)):
        for y, head in enumerate(_colours(view, strength, merged)):
            tile = head.repeat(pixels, 0).repeat(pixels, 1)
            picture[y * height : y * height + tile.shape[0], x * width : x * width + tile.shape[1]] = tile
    return picture


def draw_layer(pattern: BlockPattern, pixels: int = 96, gap: int = 4) -> Picture:
    """Draw a layer's heads side by side, about `pixels` high, or less if the width would pass `MOST_PIXELS`."""
    rows, cols = pattern.keep.shape[1:]
    scale, merged = _scale([(1, rows), (pattern.num_heads, cols)], max(1, pixels // rows), gap)
    colours = _colours(LayerView(pattern), None, merged).repeat(scale, 1).repeat(scale, 2)
    between = np.full((colours.shape[1], gap, 3), 255, dtype=np.uint8)
    return np.concatenate([part for tile in colours for part in (tile, between)][:-1], axis=1)


def _scale(sides: Sequence[tuple[int, int]], pixels: int, gap: int) -> tuple[int, int]:
    """Find the finest scale at which no side is longer than `MOST_PIXELS`; if there is none, a pixel per head.

    Returns:
        Pixels per side of a square, and blocks per side of the square.
    """
    most = max(blocks for _, blocks in sides)
    for scale, merged in [(scale, 1) for scale in range(pixels, 0, -1)] + [(1, merged) for merged in range(2, most)]:
        if all(tiles * (-(-blocks // merged) * scale + gap) - gap <= MOST_PIXELS for tiles, blocks in sides):
            return scale, merged
    return 1, most


def views(
    patterns: Mapping[str, BlockPattern],
    scores: Mapping[str, Tensor] | None = None,
    before: Mapping[str, Tensor] | None = None,
) -> list[LayerView]:
    """Make the views of the atlas from patterns, scores and former keep masks by layer."""
    scores, before = scores or {}, before or {}
    return [LayerView(pattern, scores.get(name), before.get(name)) for name, pattern in patterns.items()]


def score_range(layers: Sequence[LayerView]) -> tuple[float, float] | None:
    """Return the lowest and highest score of a kept block, the ends of the colour scale; None without scores."""
    kept = [v.scores.cpu()[v.pattern.keep].float().numpy() for v in layers if v.scores is not None and _fits(v)]
    known = np.concatenate([part[np.isfinite(part)] for part in kept]) if kept else np.zeros(0, dtype=np.float32)
    if not known.size:
        return None
    return max(float(known.min()), LEAST), max(float(known.max()), LEAST)


def _fits(view: LayerView) -> bool:
    return view.scores is not None and view.scores.shape == view.pattern.keep.shape


def _strengths(layers: Sequence[LayerView]) -> list[np.ndarray[Any, np.dtype[np.float32]] | None]:
    """Bring scores to one logarithmic scale for the whole picture, in [0, 1] between the ends of `score_range`."""
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


def _colours(view: LayerView, strength: np.ndarray[Any, np.dtype[np.float32]] | None, merged: int) -> Picture:
    """Colour blocks, (num_heads, q_blocks, kv_blocks, 3); both numbers are divided by `merged`, rounded up."""
    paper, pruned, kept, regrown, lost, first_level = range(6)
    keep, possible = view.pattern.keep.numpy(), view.pattern.possible.numpy()
    numbers = np.full(keep.shape, paper, dtype=np.uint8)
    numbers[:, possible] = pruned
    numbers[keep] = kept if strength is None else first_level + (strength[keep] * (LEVELS - 1)).astype(np.uint8)
    if view.before is not None and view.before.shape == view.pattern.keep.shape:
        before = view.before.numpy()
        numbers[keep & ~before] = regrown
        numbers[~keep & before & possible] = lost
    colours: Picture = PALETTE[numbers]
    return colours if merged == 1 else _merge(colours, merged)


def _merge(colours: Picture, merged: int) -> Picture:
    """Replace squares of blocks by their mean colour; squares at the far edges may be smaller."""
    heads, rows, cols, _ = colours.shape
    sums = np.zeros((heads, -(-rows // merged), -(-cols // merged), 3), dtype=np.uint32)
    counts = np.zeros((*sums.shape[1:3], 1), dtype=np.uint32)
    for row in range(merged):
        for col in range(merged):
            part = colours[:, row::merged, col::merged]
            sums[:, : part.shape[1], : part.shape[2]] += part
            counts[: part.shape[1], : part.shape[2]] += 1
    return (sums // counts).astype(np.uint8)


def framed_atlas(layers: Sequence[LayerView], pixels: int = 2, gap: int = 2) -> Picture:
    """Draw the atlas with numbers of layers above, numbers of heads on the left, and the colour scale below.

    Raises:
        ImportError: If Pillow is missing; the loggers that take pictures need it as well.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = draw_atlas(layers, pixels, gap)
    height, width, _ = picture.shape
    size = (max(LEFT + width, LEAST_WIDTH), TOP + height + BOTTOM)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(Image.fromarray(picture), (LEFT, TOP))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    heads = max((view.pattern.num_heads for view in layers), default=0)
    for number in _numbers(len(layers), (width + gap) / max(len(layers), 1), room=22):
        middle = LEFT + (number + 0.5) * (width + gap) / len(layers) - gap / 2
        pen.text((middle, TOP - 6), str(number), INK, font, anchor="ms")
    for number in _numbers(heads, (height + gap) / max(heads, 1), room=14):
        middle = TOP + (number + 0.5) * (height + gap) / heads - gap / 2
        pen.text((LEFT - 7, middle), str(number), INK, font, anchor="rm")

    x, y = LEFT, TOP + height + 24
    ends = score_range(layers)
    if ends is None:
        x = _swatch(pen, font, x, y, KEPT, "kept")
    else:
        x = _text(pen, font, x, y, f"kept, score {ends[0]:.2g}")
        shares = np.linspace(0.0, 1.0, 120)[:, None]
        ramp = np.asarray(KEPT_WEAK) + shares * (np.asarray(KEPT_STRONG) - np.asarray(KEPT_WEAK))
        sheet.paste(Image.fromarray(np.tile(ramp.astype(np.uint8), (12, 1, 1))), (x + 8, y - 6))
        x = _text(pen, font, x + 136, y, f"{ends[1]:.2g}") + 20
    for colour, meaning in SWATCHES:
        x = _swatch(pen, font, x, y, colour, meaning)
    return np.asarray(sheet)


def _numbers(count: int, apart: float, room: int) -> range:
    """Choose which of `count` numbers, `apart` pixels from each other, to write so that each has `room`."""
    return range(0, count, max(1, int(np.ceil(room / apart))) if count else 1)


def _text(pen: ImageDraw.ImageDraw, font: Font, x: int, y: int, text: str) -> int:
    """Write text; return where it ends."""
    pen.text((x, y), text, INK, font, anchor="lm")
    return x + round(pen.textlength(text, font))


def _swatch(pen: ImageDraw.ImageDraw, font: Font, x: int, y: int, colour: tuple[int, int, int], text: str) -> int:
    pen.rectangle((x, y - 6, x + 11, y + 5), colour)
    return _text(pen, font, x + 18, y, text) + 20
