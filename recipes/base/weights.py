"""Checks that files of weights are complete, and no pointers of Git LFS."""

from __future__ import annotations

import json
from pathlib import Path

_POINTER = b"version https://git-lfs"
_KINDS = {".safetensors", ".bin", ".gguf"}


def check_weights(place: Path) -> None:
    """Refuse files that are incomplete or missing, or pointers of Git LFS.

    Args:
        place: A file of weights, or a folder that holds some.

    Raises:
        ValueError: If a file is incomplete or missing; the message names it.
    """
    files = [place] if place.is_file() else sorted(file for file in place.glob("*") if file.suffix in _KINDS)
    for file in files:
        problem = _problem(file)
        if problem is not None:
            raise ValueError(f"`model` must hold whole weights, got {str(file)!r}, {problem}.")
    missing = _missing(place)
    if missing:
        names = ", ".join(map(repr, missing))
        raise ValueError(f"`model` must hold whole weights, got {str(place)!r} without {names}. Copy it again.")


def _missing(folder: Path) -> list[str]:
    """Files of weights that an index or an adapter's configuration speaks of and that are not there."""
    named = {
        name
        for index in folder.glob("*.index.json")
        for name in json.loads(index.read_text("utf-8")).get("weight_map", {}).values()
    }
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.bin").is_file():
        named.add("adapter_model.safetensors")
    return sorted(name for name in named if not (folder / name).is_file())


def _problem(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
        if start == _POINTER:
            return f"a pointer of Git LFS, not the file. Run `git lfs pull` in {str(file.parent)!r}"
        if file.suffix == ".safetensors":
            wanted = _safetensors_size(start[:8], file)
            if wanted is None or size < wanted:
                expected = "" if wanted is None else f" of {wanted}"
                return f"of which only {size}{expected} bytes are there, or another kind of file. Copy it again"
        if file.suffix == ".gguf" and not start.startswith(b"GGUF"):
            return "which is no GGUF file. Copy it again, or name another"
    return None


def _safetensors_size(start: bytes, file: Path) -> int | None:
    """Bytes of the complete file, by its header; None if the header cannot be read."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > file.stat().st_size:
        return None
    with file.open("rb") as opened:
        opened.seek(8)
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
    return 8 + length + max(ends, default=0)
