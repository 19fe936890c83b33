"""The page: the run's data as JSON inside a template that draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from sparse_prune import metrics
from sparse_prune.commands.report.animation import blocks_per_cell, frames, thin_out
from sparse_prune.commands.report.logs import RunLogs, Series
from sparse_prune.losses import find_loss
from sparse_prune.metrics import Metric
from sparse_prune.pattern import BlockPattern


def render(logs: RunLogs) -> str:
    """The whole page as HTML, with nothing to fetch."""
    data = json.dumps(describe(logs), separators=(",", ":"), allow_nan=False)
    # Inside a script element only "</" and "<!--" could end or comment out what follows.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (files("sparse_prune.commands.report") / "page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data)


def describe(logs: RunLogs) -> dict[str, Any]:
    """Everything that the page shows, as JSON types."""
    shown = thin_out(logs.steps)
    last = logs.frame(shown[-1]) if shown else {}
    merged = blocks_per_cell(last, len(shown))
    return {
        "name": str(logs.folder),
        "facts": _facts(logs),
        "charts": _charts(logs),
        "swaps": sorted({step for key in metrics.LAYER_SWAP.keys(logs.metrics) for step, _ in logs.metrics[key]}),
        "frames": frames(((step, logs.frame(step)) for step in shown), merged),
        "merged": merged,
        "table": _table(last, logs.metrics),
    }


def _facts(logs: RunLogs) -> list[list[str]]:
    """Headline numbers: label, value, explanation."""

    def last(key: str, of: Mapping[str, Series] = logs.metrics) -> float | None:
        return of[key][-1][1] if key in of else None

    facts = []
    sparsity, kept = last(metrics.SPARSITY.key), last(metrics.MASS.key)
    loss = next((key for stage in ("test", "validation", "training") if (key := find_loss(stage, logs.metrics))), None)
    if sparsity is not None:
        facts.append(["Pruned", f"{sparsity:.1%}", "of the possible attention blocks"])
    if loss is not None:
        value, dense = logs.metrics[loss][-1][1], last(loss, logs.dense)
        note = f"{value / dense - 1.0:+.2%} against the dense twin" if dense else "no dense twin"
        facts.append(["Loss", f"{value:.4f}", f"{loss}, {note}"])
    if kept is not None:
        facts.append(["Attention kept", f"{kept:.1%}", "of the probability falls into kept blocks"])
    swapped, layers = last(metrics.SPARSE_LAYERS.key), len(metrics.LAYER_SPARSITY.keys(logs.metrics))
    if swapped is not None:
        facts.append(["Swapped", f"{int(swapped)} of {layers}", "layers run block-sparse"])
    cache = last(metrics.KV_SHARE.key)
    if cache is not None:
        facts.append(["KV cache", f"−{cache:.0%}", "need not be kept (estimate)"])
    return facts


def _charts(logs: RunLogs) -> list[dict[str, Any]]:
    """The loss, and then the charts that the registry of metrics describes, as far as the run logged them."""
    charts = [_loss_chart(logs)]
    for chart, shown in metrics.charts().items():
        if chart.on_page:
            lines = [line for metric in shown if not metric.event for line in _lines(metric, logs.metrics)]
            charts.append({"title": chart.title, "unit": chart.unit, "lines": lines})
    return [chart for chart in charts if chart["lines"]]


def _loss_chart(logs: RunLogs) -> dict[str, Any]:
    wanted = [
        ("dense, training", logs.dense, "training", "muted"),
        ("pruned, training", logs.metrics, "training", "main"),
        ("pruned, validation", logs.metrics, "validation", "accent"),
        ("dense, validation", logs.dense, "validation", "second"),
    ]
    lines = [
        {"name": name, "points": of[key], "style": style}
        for name, of, stage, style in wanted
        if (key := find_loss(stage, of)) is not None
    ]
    return {"title": "Loss", "unit": "as logged", "lines": lines}


def _lines(metric: Metric, series: Mapping[str, Series]) -> list[dict[str, Any]]:
    """The curves of a metric, one per layer where it has as many."""

    def name(key: str) -> str:
        return f"{metric.label} {key.rpartition('_')[2]}" if metric.per_layer else metric.label

    return [{"name": name(key), "points": series[key], "style": metric.style} for key in metric.keys(series)]


def _table(patterns: Mapping[str, BlockPattern], series: Mapping[str, Series]) -> dict[str, Any]:
    """A row per layer, with the sparsity of each head."""
    rows: list[dict[str, Any]] = []
    for index, (name, pattern) in enumerate(patterns.items()):
        swap = series.get(metrics.LAYER_SWAP.of_layer(index), [])
        kept = series.get(metrics.LAYER_MASS.of_layer(index), [])
        state = "moving" if not swap else "sparse" if swap[-1][1] else "dense again"
        settled = swap[-1][0] if swap else None
        rows.append(
            {
                "layer": name, "sparsity": pattern.sparsity, "kept": kept[-1][1] if kept else None, "state": state,
                "settled": settled, "heads": [round(share, 4) for share in pattern.head_sparsity.tolist()],
            }
        )  # fmt: skip
    return {"rows": rows, "heads": max((len(row["heads"]) for row in rows), default=0)}
