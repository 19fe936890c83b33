"""The page: the run's data as JSON inside a template that draws it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from sparse_prune.callbacks.losses import find_loss
from sparse_prune.commands.report.animation import blocks_per_cell, frames, thin_out
from sparse_prune.commands.report.logs import RunLogs, Series
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
    metrics = logs.metrics
    shown = thin_out(logs.steps)
    last = logs.frame(shown[-1]) if shown else {}
    merged = blocks_per_cell(last, len(shown))
    return {
        "name": str(logs.folder),
        "facts": _facts(logs),
        "charts": _charts(logs),
        "swaps": sorted({step for key in metrics if key.startswith("swap/layer_") for step, _ in metrics[key]}),
        "frames": frames(((step, logs.frame(step)) for step in shown), merged),
        "merged": merged,
        "table": _table(last, metrics),
    }


def _facts(logs: RunLogs) -> list[list[str]]:
    """Headline numbers: label, value, explanation."""

    def last(key: str, of: Mapping[str, Series] = logs.metrics) -> float | None:
        return of[key][-1][1] if key in of else None

    facts = []
    sparsity, kept = last("sparsity/total"), last("mass/kept")
    loss = next((key for stage in ("test", "validation", "training") if (key := find_loss(stage, logs.metrics))), None)
    if sparsity is not None:
        facts.append(["Pruned", f"{sparsity:.1%}", "of the possible attention blocks"])
    if loss is not None:
        value, dense = logs.metrics[loss][-1][1], last(loss, logs.dense)
        note = f"{value / dense - 1.0:+.2%} against the dense twin" if dense else "no dense twin"
        facts.append(["Loss", f"{value:.4f}", f"{loss}, {note}"])
    if kept is not None:
        facts.append(["Attention kept", f"{kept:.1%}", "of the probability falls into kept blocks"])
    swapped, layers = last("swap/sparse_layers"), sum(key.startswith("sparsity/layer_") for key in logs.metrics)
    if swapped is not None:
        facts.append(["Swapped", f"{int(swapped)} of {layers}", "layers run block-sparse"])
    cache = last("savings/kv_share")
    if cache is not None:
        facts.append(["KV cache", f"−{cache:.0%}", "need not be kept (estimate)"])
    return facts


def _charts(logs: RunLogs) -> list[dict[str, Any]]:
    metrics, dense = logs.metrics, logs.dense
    changes, layers = _of_layers("settle/change_layer_", metrics), _of_layers("sparsity/layer_", metrics)

    def loss(stage: str, of: Mapping[str, Series]) -> Series:
        return of.get(find_loss(stage, of) or "", [])

    wanted: list[tuple[str, str, list[tuple[str, Series, str]]]] = [
        (
            "Loss", "as logged",
            [
                ("dense, training", loss("training", dense), "muted"),
                ("pruned, training", loss("training", metrics), "main"),
                ("pruned, validation", loss("validation", metrics), "accent"),
                ("dense, validation", loss("validation", dense), "second"),
            ],
        ),
        (
            "Sparsity", "share of blocks pruned",
            [
                ("requested", metrics.get("prune/requested", []), "muted"),
                ("achieved", metrics.get("sparsity/total", []), "main"),
            ],
        ),
        ("Sparsity per layer", "share of blocks pruned", [(_number(key), metrics[key], "thin") for key in layers]),
        (
            "Change per layer", "share of blocks moved",
            [(_number(key), metrics[key], "thin") for key in changes]
            + [("settles below", metrics.get("settle/min_delta", []), "accent")],
        ),
        ("Threshold", "score", [("threshold", metrics.get("prune/threshold", []), "main")]),
        ("Attention kept", "share of probability", [("kept", metrics.get("mass/kept", []), "main")]),
        ("Step time", "seconds", [("pruned", metrics.get("time/step_seconds", []), "main")]),
        ("Speed", "tokens per second", [("pruned", metrics.get("time/tokens_per_second", []), "main")]),
        (
            "Savings (estimates)", "share",
            [
                ("attention FLOPs", metrics.get("savings/attention_flops_share", []), "main"),
                ("KV cache", metrics.get("savings/kv_share", []), "second"),
            ],
        ),
        (
            "Attention FLOPs saved", "per pass, estimate",
            [("saved", metrics.get("savings/attention_flops", []), "main")],
        ),
        ("KV cache saved", "bytes, estimate", [("saved", metrics.get("savings/kv_bytes", []), "main")]),
    ]  # fmt: skip
    charts = []
    for title, unit, lines in wanted:
        kept = [{"name": name, "points": points, "style": style} for name, points, style in lines if points]
        if kept:
            charts.append({"title": title, "unit": unit, "lines": kept})
    return charts


def _of_layers(prefix: str, metrics: Mapping[str, Series]) -> list[str]:
    """Keys of layers in the order of the layers' numbers, which may have two digits or more."""
    return sorted((key for key in metrics if key.startswith(prefix)), key=lambda key: int(key.removeprefix(prefix)))


def _number(key: str) -> str:
    return "layer " + key.rpartition("_")[2]


def _table(patterns: Mapping[str, BlockPattern], metrics: Mapping[str, Series]) -> dict[str, Any]:
    """A row per layer, with the sparsity of each head."""
    rows: list[dict[str, Any]] = []
    for index, (name, pattern) in enumerate(patterns.items()):
        swap = metrics.get(f"swap/layer_{index:02d}", [])
        kept = metrics.get(f"mass/kept_layer_{index:02d}", [])
        state = "moving" if not swap else "sparse" if swap[-1][1] else "dense again"
        settled = swap[-1][0] if swap else None
        rows.append(
            {
                "layer": name, "sparsity": pattern.sparsity, "kept": kept[-1][1] if kept else None, "state": state,
                "settled": settled, "heads": [round(share, 4) for share in pattern.head_sparsity.tolist()],
            }
        )  # fmt: skip
    return {"rows": rows, "heads": max((len(row["heads"]) for row in rows), default=0)}
