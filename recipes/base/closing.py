"""The last lines that a run prints: where the files are, and what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def where_and_next(report: Path, folder: Path, export: str | None, commands: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the paths of all files, and with commands to run next, ready to copy."""
    lines = [f"Report: {report}", f"Logs, settings, patterns: {folder}"]
    if export is not None:
        lines.append(f"Pruned model with its patterns: {export}")
    return [*lines, "Next:", *(f"  {shlex.join([_program(), *command])}" for command in commands)]


def _program() -> str:
    """The command for a shell: its name, or its path if the name is unknown or of another program."""
    own = Path(sys.executable).parent / "sparse-prune"
    if not own.exists() or shutil.which("sparse-prune") == str(own):
        return "sparse-prune"
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)
