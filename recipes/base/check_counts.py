"""A check of counts that users give."""

from __future__ import annotations


def check_counts(**counts: int) -> None:
    """Refuse counts that are not positive.

    Args:
        **counts: Name in the error -> count.

    Raises:
        ValueError: If one is below 1.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
