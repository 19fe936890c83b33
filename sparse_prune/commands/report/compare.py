"""Shows several runs on one page: what each one pruned, and what that cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sparse_prune.commands.report.logs import RunLogs
from sparse_prune.commands.report.page import fill
from sparse_prune.commands.report.verdict import LIMITS_TOLD, Numbers, figures, numbers


def render(runs: Sequence[RunLogs]) -> str:
    """Return the whole page as HTML that fetches nothing."""
    return fill(describe(runs))


def describe(runs: Sequence[RunLogs]) -> dict[str, Any]:
    """Describe everything that the page shows, as JSON types."""
    shared = os.path.commonpath([run.folder for run in runs])
    names = _names([os.path.relpath(run.folder, shared) for run in runs])
    found = [numbers(run) for run in runs]
    loss = " and ".join(sorted({run.loss_key for run in found if run.loss_key}))
    quality = " and ".join(sorted({run.quality_name for run in found if run.quality_name}))
    return {
        "kind": "compare",
        "name": shared,
        "limits": LIMITS_TOLD,
        "rows": [_row(name, run) for name, run in zip(names, found, strict=True)],
        "charts": [
            _chart("Loss against sparsity", f"{loss} as logged, nats for cross-entropy", found, "loss"),
            _chart("Retrieval against sparsity", f"{quality}, share", found, "quality"),
            _chart("Step time against sparsity", "seconds, median", found, "seconds"),
        ],
    }


def _row(name: str, run: Numbers) -> dict[str, Any]:
    plain = {"name": name, "sparsity": run.sparsity, "loss": run.loss, "quality": run.quality, "seconds": run.seconds}
    judged = [
        {"value": figure.value if figure.clause else "not compared", "judgement": figure.judgement, "note": figure.note}
        for figure in figures(run)
    ]
    return plain | {"finished": run.finished, "step": run.step, "figures": judged}


def _names(folders: Sequence[str]) -> list[str]:
    """Cut off the end that all folders share."""
    parts = [folder.split(os.sep) for folder in folders]
    while len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return [os.sep.join(each) for each in parts]


def _chart(title: str, unit: str, found: Sequence[Numbers], what: str) -> dict[str, Any]:
    """Describe a chart with a point per run and per dense twin; twins stand at sparsity 0."""
    points = [
        {"run": number, "twin": twin, "x": 0.0 if twin else run.sparsity, "y": value}
        for number, run in enumerate(found)
        for twin in (False, True)
        if (value := getattr(run, f"dense_{what}" if twin else what)) is not None and run.sparsity is not None
    ]
    return {"title": title, "unit": unit, "points": points}
