"""Counts that users give."""

from __future__ import annotations


def check_counts(**counts: int) -> None:
    """Refuse counts that are not positive.

    Args:
        **counts: By the name that the error says.

    Raises:
        ValueError: If one is below 1.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
