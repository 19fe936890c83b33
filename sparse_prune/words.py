"""Numbers and lists in words, for people to read."""

from __future__ import annotations

from collections.abc import Sequence


def factor(ratio: float, more: str, less: str) -> str:
    """Tell a ratio in words: "1.25x faster" for 1.25, "1.25x slower" for 0.8, if these are the words; 0 stays 0."""
    return f"{1 / ratio:.2f}x {less}" if 0 < ratio < 1 else f"{ratio:.2f}x {more}"


def duration(seconds: float) -> str:
    """Tell the time of a step in three digits: "12.8 s", "35.1 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def some(names: Sequence[str], most: int = 3, comma: str = ", ") -> str:
    """List the first names, and tell how many there are besides: "a, b, c and 4 more"."""
    shown = comma.join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
