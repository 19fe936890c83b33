"""Reads what a run left in its folder: metrics by key, settings, and patterns by step."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_prune.commands.report.offline import read_offline
from sparse_prune.export.history import FOLDER, frame_steps, load_frame
from sparse_prune.losses import TWIN
from sparse_prune.metrics import METRICS
from sparse_prune.pattern import BlockPattern

Series = list[tuple[int, float]]
"""(optimizer steps taken, value), ascending. Loggers count from 0 and log under n what holds after n + 1 steps."""
_LOGS = ("metrics.csv", "run-*.wandb")


@dataclass(frozen=True)
class RunLogs:
    """What loggers recorded of a run."""

    folder: Path
    """Folder of metrics.csv, or of W&B's file."""
    metrics: Mapping[str, Series]
    """Key -> series."""
    dense: Mapping[str, Series]
    """As `metrics`, of the dense twin that a recipe trained; empty if there is none."""
    steps: Sequence[int]
    """Steps of which the pattern history has a frame, ascending."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Hyperparameters and configuration, flat, as text; slashes join the parts of a name."""
    history: Path | None = None
    """Folder of the pattern history; None: `folder`."""

    def frame(self, step: int) -> Mapping[str, BlockPattern]:
        """Load the patterns after a step, layer -> pattern.

        Raises:
            ValueError: If the frame is damaged.
        """
        return load_frame(self.history or self.folder, step)


def read_run(folder: Path) -> RunLogs:
    """Read the logs of `CSVLogger`, or else those of W&B's client on disk, and find the patterns of `SparsityLogger`.

    Raises:
        FileNotFoundError: If there are no logs.
        ImportError: If there are logs of W&B alone, and wandb is missing.
        ValueError: If the logs are damaged.
    """
    file = _latest(folder)
    home = file.parent
    if file.suffix == ".csv":
        metrics, settings, history = _series(_csv_rows(file)), _settings(home), home
    else:
        rows, settings = read_offline(file)
        metrics = _series(rows)
        # Lightning keeps the files of such a run in SAVE_DIR/PROJECT/RUN_ID, W&B its own in SAVE_DIR/wandb/...
        run_id = file.stem.removeprefix("run-")
        found = sorted(home.parent.parent.glob(f"*/{run_id}/{FOLDER}"))
        history = found[0].parent if found else home
    twin = home / "dense" / "metrics.csv"
    beside = {key.removeprefix(TWIN): metrics.pop(key) for key in list(metrics) if key.startswith(TWIN)}
    dense = beside | (_series(_csv_rows(twin)) if twin.is_file() else {})
    return RunLogs(home, metrics, dense, frame_steps(history), settings, history)


def _latest(folder: Path) -> Path:
    for name in _LOGS:
        found = list(folder.glob(name)) or [path for path in folder.rglob(name) if path.parent.name != "dense"]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    raise FileNotFoundError(
        f"`run` must be a folder with a metrics.csv inside, or with a run-*.wandb, got {str(folder)!r}. "
        "Give the Trainer a CSVLogger beside your other loggers, and pass its folder."
    )


def _csv_rows(path: Path) -> Iterable[tuple[int, dict[str, float]]]:
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = int(float(row.pop("step")))
                yield step, {key: float(text) for key, text in row.items() if text}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path} must hold a step and numbers in every row, got {error!r} in line {number}. Remove it."
                ) from error


def _series(rows: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Series]:
    """Collect key -> series, without values that are not finite, and without the logger's prefix of keys."""
    series: dict[str, dict[int, float]] = {}
    for step, row in rows:
        for key, value in row.items():
            if math.isfinite(value):
                series.setdefault(key, {})[step + 1] = value
    series.pop("epoch", None)
    prefix = _prefix(series)
    return {key.removeprefix(prefix): sorted(points.items()) for key, points in series.items()}


def _prefix(keys: Iterable[str]) -> str:
    """Find what a Lightning logger with a `prefix` puts before every key, by the keys of pruning's metrics."""
    known = "|".join(metric.pattern for metric in METRICS)
    return next((found[1] for key in keys if (found := re.fullmatch(rf"(.+-)(?:{known})", key))), "")


def _settings(home: Path) -> dict[str, str]:
    """Read the settings in hparams.yaml and in a recipe's config.yaml."""
    found: dict[str, str] = {}
    for name in ("config.yaml", "hparams.yaml"):
        if (home / name).is_file():
            import yaml

            # As text and without tags, which a logger may write for any type.
            with open(home / name, encoding="utf-8") as file:
                try:
                    found |= flat(yaml.load(file, yaml.BaseLoader) or {})
                except yaml.YAMLError as error:
                    raise ValueError(f"{home / name} must be YAML, got {error!r}. Mend or remove it.") from error
    return found


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Flatten nested settings to path -> text, with paths such as trainer/max_steps."""
    if isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)}
    return {
        key: text
        for part, inner in value.items()
        for key, text in flat(inner, f"{name}/{part}" if name else part).items()
    }
