"""The atlas with what a reader needs beside it: numbers of layers and heads, and the colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sparse_prune.callbacks import atlas
from sparse_prune.callbacks.atlas import LayerView, Picture, draw_atlas, score_range

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

LEFT, TOP, BOTTOM = 30, 26, 44
"""Pixels around the atlas: numbers of heads, numbers of layers, the scale."""
LEAST_WIDTH = 680
"""Pixels that the scale needs."""
INK = (70, 80, 96)
SWATCHES = ((atlas.PRUNED, "pruned"), (atlas.REGROWN, "regrown"), (atlas.LOST, "pruned since the last picture"))


def framed_atlas(layers: Sequence[LayerView], pixels: int = 2, gap: int = 2) -> Picture:
    """`draw_atlas` with numbers of layers above, of heads on the left, and the colour scale below.

    Args:
        layers: In the order of the model.
        pixels: Side of a block, if there is room.
        gap: Pixels between heads.

    Raises:
        ImportError: If Pillow is missing; the loggers that take pictures need it as well.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = draw_atlas(layers, pixels, gap)
    height, width, _ = picture.shape
    size = (max(LEFT + width, LEAST_WIDTH), TOP + height + BOTTOM)
    sheet = Image.new("RGB", size, atlas.PAPER)
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
        x = _swatch(pen, font, x, y, atlas.KEPT, "kept")
    else:
        x = _text(pen, font, x, y, f"kept, score {ends[0]:.2g}")
        shares = np.linspace(0.0, 1.0, 120)[:, None]
        ramp = np.asarray(atlas.KEPT_WEAK) + shares * (np.asarray(atlas.KEPT_STRONG) - np.asarray(atlas.KEPT_WEAK))
        sheet.paste(Image.fromarray(np.tile(ramp.astype(np.uint8), (12, 1, 1))), (x + 8, y - 6))
        x = _text(pen, font, x + 136, y, f"{ends[1]:.2g}") + 20
    for colour, meaning in SWATCHES:
        x = _swatch(pen, font, x, y, colour, meaning)
    return np.asarray(sheet)


def _numbers(count: int, apart: float, room: int) -> range:
    """Which of `count` numbers, `apart` pixels from each other, to write so that each has `room`."""
    return range(0, count, max(1, int(np.ceil(room / apart))) if count else 1)


def _text(pen: ImageDraw.ImageDraw, font: Font, x: int, y: int, text: str) -> int:
    """Write it; where it ends."""
    pen.text((x, y), text, INK, font, anchor="lm")
    return x + round(pen.textlength(text, font))


def _swatch(pen: ImageDraw.ImageDraw, font: Font, x: int, y: int, colour: tuple[int, int, int], text: str) -> int:
    pen.rectangle((x, y - 6, x + 11, y + 5), colour)
    return _text(pen, font, x + 18, y, text) + 20
