"""The page: the run's data as JSON inside a template that draws it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from sparse_prune.recipes.run_report.logs import RunLogs, Series

from sparse_prune.pattern import BlockPattern

MOST_FRAMES = 60
"""Frames that the animation shows; longer histories are thinned out."""


def render(logs: RunLogs) -> str:
    """The whole page as HTML, with nothing to fetch."""
    data = json.dumps(describe(logs), separators=(",", ":"), allow_nan=False)
    # Inside a script element only "</" and "<!--" could end or comment out what follows.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    template = (files("sparse_prune.recipes.run_report") / "page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data)


def describe(logs: RunLogs) -> dict[str, Any]:
    """Everything that the page shows, as JSON types."""
    metrics = logs.metrics
    steps = sorted(logs.frames)
    shown = steps if len(steps) <= MOST_FRAMES else [steps[i] for i in _spread(len(steps), MOST_FRAMES)]
    last = logs.frames[steps[-1]] if steps else {}
    return {
        "name": logs.name,
        "facts": _facts(logs),
        "charts": _charts(logs),
        "swaps": sorted({step for key in metrics if key.startswith("swap/layer_") for step, _ in metrics[key]}),
        "frames": [{"step": step, "layers": [_packed(p) for p in logs.frames[step].values()]} for step in shown],
        "table": _table(last, metrics),
    }


def _spread(count: int, most: int) -> list[int]:
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _facts(logs: RunLogs) -> list[list[str]]:
    """Headline numbers: label, value, explanation."""

    def last(key: str, of: Mapping[str, Series] = logs.metrics) -> float | None:
        return of[key][-1][1] if key in of else None

    facts = []
    sparsity, loss, kept = last("sparsity/total"), _final_loss(logs.metrics), last("mass/kept")
    if sparsity is not None:
        facts.append(["Pruned", f"{sparsity:.1%}", "of the possible attention blocks"])
    if loss is not None:
        dense = _final_loss(logs.dense)
        note = "no dense twin" if dense is None else f"{loss[1] / dense[1] - 1.0:+.2%} against the dense twin"
        facts.append(["Loss", f"{loss[1]:.4f}", f"{loss[0]}, {note}"])
    if kept is not None:
        facts.append(["Attention kept", f"{kept:.1%}", "of the probability falls into kept blocks"])
    swapped, layers = last("swap/sparse_layers"), sum(key.startswith("sparsity/layer_") for key in logs.metrics)
    if swapped is not None:
        facts.append(["Swapped", f"{int(swapped)} of {layers}", "layers run block-sparse"])
    cache = last("savings/kv_share")
    if cache is not None:
        facts.append(["KV cache", f"−{cache:.0%}", "need not be kept (estimate)"])
    return facts


def _final_loss(metrics: Mapping[str, Series]) -> tuple[str, float] | None:
    for key in ("test/loss", "val/loss", "train/loss"):
        if metrics.get(key):
            return key, metrics[key][-1][1]
    return None


def _charts(logs: RunLogs) -> list[dict[str, Any]]:
    metrics, dense = logs.metrics, logs.dense
    changes = sorted(key for key in metrics if key.startswith("settle/change_layer_"))
    layers = sorted(key for key in metrics if key.startswith("sparsity/layer_"))
    wanted: list[tuple[str, str, list[tuple[str, Series, str]]]] = [
        (
            "Loss", "nats",
            [
                ("dense, training", dense.get("train/loss", []), "muted"),
                ("pruned, training", metrics.get("train/loss", []), "main"),
                ("pruned, validation", metrics.get("val/loss", []), "accent"),
                ("dense, validation", dense.get("val/loss", []), "second"),
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


def _number(key: str) -> str:
    return "layer " + key.rpartition("_")[2]


def _packed(pattern: BlockPattern) -> dict[str, Any]:
    heads, rows, cols = pattern.keep.shape
    bits = {name: np.packbits(part.numpy()) for name, part in (("keep", pattern.keep), ("possible", pattern.possible))}
    return {"heads": heads, "rows": rows, "cols": cols} | {
        name: base64.b64encode(packed.tobytes()).decode() for name, packed in bits.items()
    }


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
