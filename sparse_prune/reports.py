"""The pieces that all reports are made of: Markdown tables, comparisons in words, and the files of a report."""

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


def factor(ratio: float, more: str, less: str) -> str:
    """Tell a ratio in words: "1.25x faster" for 1.25, "1.25x slower" for 0.8, if these are the words."""
    return f"{ratio:.2f}x {more}" if ratio >= 1 else f"{1 / ratio:.2f}x {less}"


def duration(seconds: float) -> str:
    """Tell the time of a step in three digits: "12.8 s", "35.1 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


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
