"""Refuses numbers that are out of range."""

from __future__ import annotations

import math

from sparse_prune.pattern import whole_number


def check_range(interval: str, remedy: str = "", /, **values: float) -> None:
    """Refuse numbers outside an interval; NaN is outside of every one.

    Args:
        interval: As it is written, such as "[0, 1)"; "[1, inf)" has no upper end.
        remedy: A sentence for the end of the error.
        **values: Argument -> number.

    Raises:
        ValueError: If a number is outside.
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        begins = value >= low if interval[0] == "[" else value > low
        ends = value <= high if interval[-1] == "]" else value < high
        if not (begins and ends):
            wanted = f"lie in {interval}"
            if math.isinf(high):
                wanted = f"be at least {low:g}" if interval[0] == "[" else f"be above {low:g}"
            raise ValueError(f"`{name}` must {wanted}, got {value}. {remedy}".rstrip())


def check_whole(name: str, value: object, least: int = 1) -> int:
    """Convert a whole number of any type to int; refuse anything else, and numbers below `least`."""
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    return number
