"""The checkpoint to go on from after a crash."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

log = logging.getLogger(__name__)


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint below a folder that is whole; None if there is none.

    Lightning writes a checkpoint beside its place and moves it there. Where the temporary folder is on another disk,
    the move copies, and a crash can leave half a file. Such files are skipped and named in the log. Checkpoints of
    several files (folders, as FSDP writes them) are not looked at.

    Args:
        folder: Where `ModelCheckpoint` writes, or any folder above it. Before the first start there is none: a log
            line says so.
    """
    root = Path(folder)
    if not root.is_dir():
        log.info("There is no folder %s, and so no checkpoint to go on from.", root)
    found = [path for path in root.rglob("*.ckpt") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if _whole(path):
            return path
        log.warning("Checkpoint %s was cut short or damaged and is skipped. Remove it.", path)
    return None


def _whole(path: Path) -> bool:
    """Whether every part of the archive that torch writes is there with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
