"""What a run left in its folder: metrics by key, and patterns by step."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_prune.callbacks.pattern_history import load_frames

from sparse_prune.pattern import BlockPattern

Series = list[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True)
class RunLogs:
    """A run as its loggers saw it."""

    name: str
    metrics: Mapping[str, Series]
    dense: Mapping[str, Series]
    """The same of the dense twin that a recipe trained; empty if there is none."""
    frames: Mapping[int, Mapping[str, BlockPattern]]
    """Step -> layer -> pattern."""


def read_run(folder: Path) -> RunLogs:
    """Read what `CSVLogger` and `SparsityLogger` wrote.

    Args:
        folder: Where metrics.csv is, or any folder above it: then the latest one below is taken.

    Raises:
        FileNotFoundError: If there is no metrics.csv.
        ValueError: If metrics.csv or a frame of the pattern history is damaged.
    """
    home = _home(folder)
    twin = home / "dense" / "metrics.csv"
    metrics = _read_csv(home / "metrics.csv")
    return RunLogs(str(home), metrics, _read_csv(twin) if twin.is_file() else {}, load_frames(home))


def _home(folder: Path) -> Path:
    if (folder / "metrics.csv").is_file():
        return folder
    found = [path.parent for path in folder.rglob("metrics.csv") if path.parent.name != "dense"]
    if not found:
        raise FileNotFoundError(
            f"`run` must be a folder with a metrics.csv inside, got {str(folder)!r}. "
            "Give the Trainer a CSVLogger beside your other loggers, and pass its folder."
        )
    return max(found, key=lambda path: (path / "metrics.csv").stat().st_mtime)


def _read_csv(path: Path) -> dict[str, Series]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    series: dict[str, dict[int, float]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            step = int(float(row["step"]))
            for key, text in row.items():
                if key not in ("step", "epoch") and text and math.isfinite(value := float(text)):
                    series.setdefault(key, {})[step] = value
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold a step and numbers in every row, got {error!r} in line {number}."
            ) from error
    return {key: sorted(points.items()) for key, points in series.items()}
