"""Paths to write at before what is written takes its place."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from pathlib import Path


def unfinished(target: Path) -> Path:
    """A free path beside `target`, named after machine and process. What dead processes left there is removed.

    Args:
        target: File or folder that is to be written.
    """
    prefix = f".{target.name}.{platform.node()}."
    for left in target.parent.glob(f"{glob.escape(prefix)}*.partial"):
        process = left.name.removeprefix(prefix).removesuffix(".partial")
        if process.isdecimal() and (int(process) == os.getpid() or not _is_alive(int(process))):
            remove(left)
    return target.with_name(f"{prefix}{os.getpid()}.partial")


def remove(path: Path) -> None:
    """Remove a file or folder as far as possible; one that is not there is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
