"""Files that are written whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write at, whose file takes the place of `target` when the block ends without an error.

    A process that is killed leaves the previous file whole, and half a file beside it, which the next one removes.

    Args:
        target: The file; its folder is made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        remove(partial)


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
        with suppress(OSError):
            path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
