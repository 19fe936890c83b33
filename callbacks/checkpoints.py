"""Finds the checkpoint to resume from after a crash."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

log = logging.getLogger(__name__)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest whole checkpoint below a folder; None if there is none.

    Lightning writes a checkpoint to a temporary folder and moves it. If that is on another disk, the move copies, and a
    crash can leave half a file. Such files are skipped with a warning. Sharded checkpoints (folders, as FSDP writes
    them) are ignored.

    Args:
        folder: The folder of `ModelCheckpoint`, or any above it. It need not exist yet: a log line says so.
    """
    root = Path(folder)
    if not root.is_dir():
        log.info("There is no folder %s, and so no checkpoint to resume from.", root)
    found = [path for path in root.rglob("*.ckpt") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if _whole(path):
            return path
        log.warning("Checkpoint %s was cut short or damaged and is skipped. Remove it.", path)
    return None


def _whole(path: Path) -> bool:
    """Whether all parts of torch's archive are there and have the right checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
