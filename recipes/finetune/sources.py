"""Where recipes find data: the standard library's sources, and data sets of the hub."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def stdlib_sources() -> dict[str, Path]:
    """Path inside the Python standard library -> file, for its sources without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(root): file for file in root.rglob("*.py")}
    return {str(name): file for name, file in found.items() if not _SKIPPED & set(name.parts)}


def hub_rows(name: str, columns: Sequence[str], argument: str) -> tuple[Any, list[str]]:
    """The training split of a hub data set, and the names of its columns.

    Args:
        name: `NAME[:CONFIG[:COLUMN...]]`.
        columns: What the columns are called where the name gives none.
        argument: What errors call the name.

    Raises:
        ValueError: If there is no such column; the message lists what there is.
    """
    from datasets import load_dataset

    data_set, config, *given = [*name.split(":"), *[""] * (1 + len(columns))][: 2 + len(columns)]
    found = [one or other for one, other in zip(given, columns, strict=True)]
    rows = load_dataset(data_set, config or None, split="train")
    for column in found:
        if column not in rows.column_names:
            raise ValueError(f"`{argument}` must name a column of {data_set!r} ({rows.column_names}), got {column!r}.")
    return rows, found
