"""Makes the page of a run: its data, as JSON, inside a template that draws them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from sparse_prune import metrics
from sparse_prune.commands.report.animation import blocks_per_cell, frames, thin_out
from sparse_prune.commands.report.heads import describe_heads
from sparse_prune.commands.report.logs import RunLogs, Series
from sparse_prune.commands.report.verdict import LIMITS_TOLD, figures, last, numbers, sentence, span, swap_steps
from sparse_prune.losses import find_loss
from sparse_prune.metrics import Metric
from sparse_prune.pattern import BlockPattern

_PARTS = ("page.css", "draw.js", "run.js", "compare.js")


def render(logs: RunLogs) -> str:
    """Return the whole page of a run as HTML that fetches nothing."""
    return fill(describe(logs))


def fill(data: Mapping[str, Any]) -> str:
    """Return the template with its data."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    # Inside a script element only "</" and "<!--" could end or comment out what follows.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    folder = files("sparse_prune.commands.report")
    page = (folder / "page.html").read_text(encoding="utf-8")
    for part in _PARTS:
        page = page.replace(f"/*{part}*/", (folder / part).read_text(encoding="utf-8"))
    return page.replace("/*DATA*/null", text)


def describe(logs: RunLogs) -> dict[str, Any]:
    """Describe everything that the page shows, as JSON types."""
    shown = thin_out(logs.steps)
    final = logs.frame(shown[-1]) if shown else {}
    merged = blocks_per_cell(final, len(shown))
    found = numbers(logs)
    main, more = _charts(logs)
    return {
        "kind": "run",
        "name": str(logs.folder),
        "sentence": sentence(found, logs.settings.get("trainer/max_steps")),
        "figures": [asdict(figure) for figure in figures(found)],
        "limits": LIMITS_TOLD,
        "facts": _facts(logs, final),
        "settings": dict(sorted(logs.settings.items())),
        "also": _also(logs),
        "charts": main,
        "more": more,
        "swaps": swap_steps(logs),
        "span": list(span(logs)),
        "frames": frames(((step, logs.frame(step)) for step in shown), merged),
        "merged": merged,
        "table": _table(final, logs),
    }


def _facts(logs: RunLogs, final: Mapping[str, BlockPattern]) -> list[list[str]]:
    """Tell what was trained on what, as far as the logs tell: label, value."""
    said = logs.settings

    def first(*names: str) -> str | None:
        return next((said[name] for name in names if said.get(name, "null") not in ("null", "", "None")), None)

    pattern = next(iter(final.values()), None)
    kind = "sparsity" if first("pruning/sparsity") else "threshold"
    facts = {
        "Model": first("model/model", "model", "pruning/model"),
        "Trained": first("model/train_only", "train_only"),
        "Data": first("data/text", "data/dataset", "data/data", "data/task", "data/class_path"),
        "Length": None if pattern is None else f"{pattern.kv_len} tokens",
        "Block size": first("pruning/block_size") if pattern is None else "{} x {} tokens".format(*pattern.block_size),
        "Schedule": _schedule(said, kind),
        "Score": first("pruning/score", "pruning/statistic"),
        "Swap": first("pruning/swap"),
        "Precision": first("trainer/precision"),
        "Machine": first("pruning/machine"),
        "Versions": first("pruning/versions"),
    }
    return [[label, value] for label, value in facts.items() if value]


def _schedule(said: Mapping[str, str], kind: str) -> str | None:
    name = said.get(f"pruning/{kind}")
    if name is None:
        return None
    steps = " to ".join(said[key] for end in ("begin", "end") if (key := f"pruning/{kind}/{end}_step") in said)
    final = said.get(f"pruning/{kind}/final")
    return f"{name} of {kind}" + (f" up to {final}" if final else "") + (f", steps {steps}" if steps else "")


def _also(logs: RunLogs) -> list[str]:
    """Tell more numbers of the end of the run in words."""
    found = {key: last(metric.key, logs.metrics) for key, metric in _ALSO.items()}
    told = [f"{value:.1%} {key}" for key, value in found.items() if value is not None]
    sparse, layers = last(metrics.SPARSE_LAYERS.key, logs.metrics), len(metrics.LAYER_SPARSITY.keys(logs.metrics))
    return told + ([f"{int(sparse)} of {layers} layers run block-sparse"] if sparse is not None else [])


_ALSO = {
    "of the attention's probability falls into kept blocks": metrics.MASS,
    "of the KV cache need not be kept (estimate)": metrics.KV_SHARE,
}


def _charts(logs: RunLogs) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Make the charts over the run, loss first, and those that are folded away, as far as the run logged them."""
    main: list[dict[str, Any]] = [_loss_chart(logs)]
    more: list[dict[str, Any]] = []
    for chart, shown in metrics.charts().items():
        if chart.on_page:
            lines = [line for metric in shown if not metric.event for line in _lines(metric, logs)]
            drawn = {"title": chart.title, "unit": chart.unit, "top": chart.top, "lines": lines}
            (main if chart.section == "Over the run" else more).append(drawn)
    return [chart for chart in main if chart["lines"]], [chart for chart in more if chart["lines"]]


def _loss_chart(logs: RunLogs) -> dict[str, Any]:
    wanted = [
        ("dense twin, training", logs.dense, "training", "muted"),
        ("pruned, training", logs.metrics, "training", "main"),
        ("dense twin, validation", logs.dense, "validation", "second"),
        ("pruned, validation", logs.metrics, "validation", "accent"),
    ]
    lines = [
        {"name": name, "points": of[key], "style": style}
        for name, of, stage, style in wanted
        if (key := find_loss(stage, of)) is not None
    ]
    return {"title": "Loss", "unit": "as logged, nats for cross-entropy", "top": None, "lines": lines}


def _lines(metric: Metric, logs: RunLogs) -> list[dict[str, Any]]:
    """Make the curves of a metric, one per layer if it has as many, above those of the dense twin."""

    def name(key: str) -> str:
        return f"{metric.label} {key.rpartition('_')[2]}" if metric.per_layer else metric.label

    # A value that is logged whenever patterns change holds until the run's last step.
    end = span(logs)[1] if metric.at == "pattern" else 0
    twin = [{"name": "dense twin", "points": logs.dense[key], "style": "muted"} for key in metric.keys(logs.dense)]
    return twin + [
        {"name": name(key), "points": _held(logs.metrics[key], end), "style": metric.style}
        for key in metric.keys(logs.metrics)
    ]


def _held(points: Series, end: int) -> Series:
    step, value = points[-1]
    return [*points, (end, value)] if step < end else points


def _table(patterns: Mapping[str, BlockPattern], logs: RunLogs) -> list[dict[str, Any]]:
    """Make a row per layer, with the numbers of each of its heads."""
    series: Mapping[str, Series] = logs.metrics
    rows: list[dict[str, Any]] = []
    for index, (name, pattern) in enumerate(patterns.items()):
        swap = series.get(metrics.LAYER_SWAP.of_layer(index), [])
        rows.append(
            {
                "layer": name,
                "sparsity": pattern.sparsity,
                "kept": last(metrics.LAYER_MASS.of_layer(index), series),
                "state": "moving" if not swap else "sparse" if swap[-1][1] else "dense again",
                "settled": swap[-1][0] if swap else None,
                **describe_heads(pattern, logs.settings),
            }
        )
    return rows
