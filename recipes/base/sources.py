"""Where recipes find text without the hub: the sources of the standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def stdlib_sources() -> dict[str, Path]:
    """Path inside the Python standard library -> file, for its sources without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(root): file for file in root.rglob("*.py")}
    return {str(name): file for name, file in found.items() if not _SKIPPED & set(name.parts)}
