"""Finds the files of users' folders, and the documents of the standard library."""

from __future__ import annotations

import logging
import sysconfig
from pathlib import Path

log = logging.getLogger(__name__)
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LEFT_BEHIND = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_HELD_OUT = {"val", "valid", "validation", "dev", "test"}


def stdlib_documents() -> dict[str, str]:
    """Return path -> text of the sources of the Python standard library, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(root): file for file in root.rglob("*.py")}
    files = {str(name): file for name, file in found.items() if not _SKIPPED & set(name.parts)}
    return {name: file.read_text(encoding="utf-8", errors="replace") for name, file in files.items()}


def files_in(folder: Path, tell: bool = True) -> list[Path]:
    """Return all files of a folder and its subfolders, without hidden ones and those of desktops."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [file for file in files if not any(map(_is_hidden, file.relative_to(folder).parts))]
    if tell and len(shown) < len(files):
        log.info("Hidden files are left out: %d in %s.", len(files) - len(shown), folder)
    return shown


def files_by_class(root: Path) -> list[tuple[str, Path]]:
    """Return class and file, from one folder per class, which may have subfolders.

    If the root holds splits, only train/CLASS is read.
    """
    inside = {path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)}
    if "train" in inside and inside - {"train"} <= _HELD_OUT:
        others = ", ".join(sorted(inside - {"train"}))
        if others:
            log.info("Of %s, train is read, of which a share is held out; left out: %s.", root, others)
        root = root / "train"
    return [(file.relative_to(root).parts[0], file) for file in files_in(root) if file.parent != root]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BEHIND
