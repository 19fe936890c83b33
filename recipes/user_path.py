"""Paths on command lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_prune.whole_file import whole_file


def user_path(text: str) -> Path:
    """A path whose `~` is the user's home: shells leave that of `--output=~/file` as it is."""
    return Path(text).expanduser()


def write_output(parser: argparse.ArgumentParser, path: Path, text: str) -> None:
    """Write what a command's `--output` names, whole or not at all; if it cannot be, end the command in a line.

    Args:
        parser: The command's.
        path: The file; its folder is made.
        text: What it shall hold.
    """
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"`output` must be a file that can be written, got {str(path)!r}: {error}.")
