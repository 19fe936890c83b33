"""Checks that files of weights are complete, and no pointers of Git LFS."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

_POINTER = b"version https://git-lfs"
_KINDS = {".safetensors", ".bin", ".gguf"}


def check_weights(place: Path) -> None:
    """Refuse files that are incomplete or missing, or pointers of Git LFS.

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
    """Return the files of weights that an index or an adapter's configuration names but that do not exist."""
    named = {
        name
        for index in folder.glob("*.index.json")
        for name in json.loads(index.read_text("utf-8")).get("weight_map", {}).values()
    }
    if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.bin").is_file():
        named.add("adapter_model.safetensors")
    return sorted(name for name in named if not (folder / name).is_file())


def _problem(file: Path) -> str | None:
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
        if start == _POINTER:
            return f"a pointer of Git LFS, not the file. Run `git lfs pull` in {str(file.parent)!r}"
        if file.suffix == ".gguf" and not start.startswith(b"GGUF"):
            return "which is not a GGUF file. Copy it again, or name another"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            return (
                f"of which only {file.stat().st_size} bytes are there, or another kind of file ({error}). Copy it again"
            )
    return None
