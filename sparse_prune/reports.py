"""The pieces that all reports are made of: Markdown tables, and the files of a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_prune.files import whole_file


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table.

    Args:
        columns: Names; a column whose name ends with a colon is aligned to the right.
        rows: A cell per column in each.
    """
    names = [column.removesuffix(":") for column in columns]
    rule = ["---:" if column.endswith(":") else "---" for column in columns]
    return "\n".join(
        f"|{'|'.join(f' {cell} ' if cell != '' else ' ' for cell in row)}|" for row in (names, rule, *rows)
    )


def write_report(folder: str | os.PathLike[str], name: str, data: Any, text: str, draw: Callable[[Path], None]) -> Path:
    """Write a report as NAME.json, NAME.png and NAME.md, each whole or not at all; return the path of the text."""
    target = Path(folder) / name
    with whole_file(target.with_suffix(".json")) as file:
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    with whole_file(target.with_suffix(".png")) as file:
        draw(file)
    with whole_file(target.with_suffix(".md")) as file:
        file.write_text(text, encoding="utf-8")
    return target.with_suffix(".md")
