"""Folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` when the block ends without an error.

    An error, or a crash at any moment, leaves the previous folder whole. On Linux the two change places in one step;
    where the file system cannot do that, a crash between two renames leaves the previous one as `previous(target)`,
    which `recover` puts back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.rglob("*"), partial):
            _flush(file)
        if not target.exists():
            os.rename(partial, target)
        elif not _exchange(partial, target):
            os.rename(target, previous(target))
            os.rename(partial, target)
            shutil.rmtree(previous(target))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def previous(target: Path) -> Path:
    """Where the previous folder stands for a moment."""
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Undo or end a swap that a crash broke off."""
    if previous(target).exists():
        if target.exists():
            shutil.rmtree(previous(target))
        else:
            os.rename(previous(target), target)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, if system and file system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
