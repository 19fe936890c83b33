"""What a run left in its folder: metrics by key, and patterns by step."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_prune.export.history import frame_steps, load_frame
from sparse_prune.pattern import BlockPattern

Series = list[tuple[int, float]]
"""(step, value), ascending."""


@dataclass(frozen=True)
class RunLogs:
    """A run as its loggers saw it."""

    folder: Path
    """Where metrics.csv is."""
    metrics: Mapping[str, Series]
    dense: Mapping[str, Series]
    """The same of the dense twin that a recipe trained; empty if there is none."""
    steps: Sequence[int]
    """Those of which the pattern history has a frame, ascending."""

    def frame(self, step: int) -> Mapping[str, BlockPattern]:
        """Layer -> pattern after a step.

        Args:
            step: One of `steps`.

        Raises:
            ValueError: If the frame is damaged.
        """
        return load_frame(self.folder, step)


def read_run(folder: Path) -> RunLogs:
    """Read what `CSVLogger` wrote, and find what `SparsityLogger` did.

    Args:
        folder: Where metrics.csv is, or any folder above it: then the latest one below is taken.

    Raises:
        FileNotFoundError: If there is no metrics.csv.
        ValueError: If metrics.csv is damaged.
    """
    home = _home(folder)
    twin = home / "dense" / "metrics.csv"
    metrics = _read_csv(home / "metrics.csv")
    return RunLogs(home, metrics, _read_csv(twin) if twin.is_file() else {}, frame_steps(home))


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
