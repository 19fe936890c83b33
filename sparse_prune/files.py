"""Files and folders that are written whole or not at all, and the paths that users type."""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; its file replaces `target` when the block ends without an error.

    A process that is killed leaves the previous file whole, and half a file beside it, which the next one removes.

    Args:
        target: The file; its folder is created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        remove(partial)


def unfinished(target: Path) -> Path:
    """Return a free path beside `target`, of this machine and process, and remove what dead processes left there."""
    prefix = f".{target.name}.{platform.node()}."
    for left in target.parent.glob(f"{glob.escape(prefix)}*.partial"):
        process = left.name.removeprefix(prefix).removesuffix(".partial")
        if process.isdecimal() and (int(process) == os.getpid() or not _is_alive(int(process))):
            remove(left)
    return target.with_name(f"{prefix}{os.getpid()}.partial")


def remove(path: Path) -> None:
    """Remove a file or folder as far as possible; it need not exist."""
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


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder to write into; it replaces `target` when the block ends without an error.

    An error, or a crash at any moment, leaves the previous folder whole. On Linux the two are exchanged in one step;
    if the file system cannot do that, a crash between two renames leaves the previous one as `previous(target)`,
    which `recover` moves back. The new folder has the permissions of the previous one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    with _partial(target, target.parent) as partial:
        yield partial
        for file in (*partial.rglob("*"), partial):
            if not file.is_symlink():
                _flush(file)
        if not target.exists():
            os.rename(partial, target)
        elif not _exchange(partial, target):
            os.rename(target, previous(target))
            os.rename(partial, target)
            shutil.rmtree(previous(target))


def obstacle(target: Path) -> str | None:
    """Return why `whole_folder` could not replace `target`, by a trial write that leaves no trace; None if it can."""
    if target.exists() and Path.cwd().is_relative_to(target):
        return f"the working folder is {Path.cwd()}"
    if os.path.ismount(target):
        return "it is a mount point"
    try:
        with _partial(target, next(parent for parent in target.parents if parent.exists())) as partial:
            (partial / "trial").touch()
    except OSError as error:
        return str(error)
    return None


def carry_over(old: Path, new: Path, own: Collection[str]) -> None:
    """Copy into `new` what only `old` holds, links and empty folders included, but nothing that `own` names."""

    def skip(folder: str, names: list[str]) -> list[str]:
        within = Path(folder).relative_to(old)
        return [name for name in names if str(within / name) in own or taken(within / name)]

    def taken(path: Path) -> bool:
        return os.path.lexists(new / path) and not (_is_folder(old / path) and _is_folder(new / path))

    shutil.copytree(old, new, symlinks=True, ignore=skip, dirs_exist_ok=True)


def previous(target: Path) -> Path:
    """Return the path of the previous folder during an exchange."""
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Undo or finish an exchange that a crash interrupted."""
    if previous(target).exists():
        if target.exists():
            shutil.rmtree(previous(target))
        else:
            os.rename(previous(target), target)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _partial(target: Path, parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` with the permissions of `target`; what is left of it at the end is removed."""
    partial = unfinished(parent / target.name)
    partial.mkdir()
    try:
        if target.exists():
            shutil.copystat(target, partial)
        yield partial
    finally:
        remove(partial)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; return whether the system and the file system could."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_path(text: str) -> Path:
    """Expand `~` to the user's home, which shells do not do in `--output=~/file`."""
    return Path(text).expanduser()


def write_output(parser: argparse.ArgumentParser, path: Path, text: str) -> None:
    """Write the file of a command's `--output`, whole or not at all; on failure end the command with a usage error."""
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"`output` must be a file that can be written, got {str(path)!r}: {error}.")
