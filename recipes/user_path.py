"""Paths on command lines."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str) -> Path:
    """A path whose `~` is the user's home: shells leave that of `--output=~/file` as it is."""
    return Path(text).expanduser()
