"""Where recipes find files: in folders of users, and, without the hub, in the standard library."""

from __future__ import annotations

import logging
import sysconfig
from pathlib import Path

log = logging.getLogger(__name__)
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_LEFT_BEHIND = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_HELD_OUT = {"val", "valid", "validation", "dev", "test"}


def stdlib_documents() -> dict[str, str]:
    """Path inside the Python standard library -> text, of its sources without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(root): file for file in root.rglob("*.py")}
    files = {str(name): file for name, file in found.items() if not _SKIPPED & set(name.parts)}
    return {name: file.read_text(encoding="utf-8", errors="replace") for name, file in files.items()}


def files_in(folder: Path, tell: bool = True) -> list[Path]:
    """All files of a folder and of those inside, but for hidden ones and what desktops leave behind.

    Args:
        folder: Where to look.
        tell: Whether to say how many are left out.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = [file for file in files if not any(map(_is_hidden, file.relative_to(folder).parts))]
    if tell and len(shown) < len(files):
        log.info("Hidden files are left out: %d in %s.", len(files) - len(shown), folder)
    return shown


def files_by_class(root: Path) -> list[tuple[str, Path]]:
    """Class and file, of one folder per class, which may hold folders itself.

    Of a root that holds splits, train/CLASS, the others are left out.
    """
    inside = {path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)}
    if "train" in inside and inside - {"train"} <= _HELD_OUT:
        others = ", ".join(sorted(inside - {"train"}))
        if others:
            log.info("Of %s, train is taken, of which a share is held out; left out: %s.", root, others)
        root = root / "train"
    return [(file.relative_to(root).parts[0], file) for file in files_in(root) if file.parent != root]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BEHIND
