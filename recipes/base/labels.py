"""Numbers labels as classes."""

from __future__ import annotations

import ast
import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

log = logging.getLogger(__name__)


def in_order(labels: Iterable[str]) -> list[str]:
    """Sort labels: numbers by value, others by name."""
    known = sorted(labels)
    try:
        return sorted(known, key=float)
    except ValueError:
        return known


def numbered(labels: Sequence[Any], argument: str, names: Sequence[str] | None = None) -> tuple[list[str], list[int]]:
    """Return the names of the classes in the order of their numbers, and every row's number.

    Args:
        labels: A label per row; blanks around it are ignored.
        argument: The name of the data in errors.
        names: Names of the classes, if the labels are numbers already; -1 then stands for a missing label. Classes
            without rows keep their numbers.

    Raises:
        ValueError: If a row has no label, or a list of them.
    """
    cells = ["" if label is None or label != label else str(label).strip() for label in labels]  # NaN is not itself
    missing = [row for row, cell in enumerate(cells, 1) if not cell or (names is not None and int(cell) < 0)]
    if missing:
        raise ValueError(
            f"`{argument}` must have a label in every row, got none{' (-1)' if names else ''} in {len(missing)} of "
            f"{len(cells)} rows, the first of them row {missing[0]}. Fill it in, or take the row out."
        )
    if names is not None:
        return list(names), list(map(int, cells))
    classes = in_order(set(cells))
    for label in classes:
        if literal(label) is not None:
            raise ValueError(
                f"`{argument}` must have one label a row, got {label!r} in row {cells.index(label) + 1}, which looks "
                "like a list. Give each row one label."
            )
    _warn_of_twins(classes)
    numbers = {label: number for number, label in enumerate(classes)}
    return classes, [numbers[label] for label in cells]


def literal(text: str) -> Any:
    """Parse a list, tuple or dictionary in Python's or JSON's syntax; None for any other text."""
    if text[:1] not in ("[", "(", "{"):
        return None
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text)
        except (MemoryError, RecursionError, SyntaxError, ValueError):
            continue
        return value if isinstance(value, list | tuple | dict) else None
    return None


def _warn_of_twins(classes: Sequence[str]) -> None:
    alike: dict[str, list[str]] = defaultdict(list)
    for label in classes:
        alike[_likeness(label)].append(label)
    twins = [" and ".join(map(repr, labels)) for labels in alike.values() if len(labels) > 1]
    if twins:
        log.warning("Classes whose names differ by their writing alone stay apart: %s.", "; ".join(twins))


def _likeness(label: str) -> str:
    """Reduce a label to what remains without case, extra blanks, invisible characters and ways of writing numbers."""
    try:
        return repr(float(label))
    except ValueError:
        visible = (sign for sign in unicodedata.normalize("NFKC", label) if unicodedata.category(sign) != "Cf")
        return " ".join("".join(visible).casefold().split())
