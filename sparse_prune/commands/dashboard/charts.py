"""Which charts a pruning run deserves, in what order. Says nothing of W&B: that is in `views`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sparse_prune import metrics
from sparse_prune.losses import loss_keys
from sparse_prune.metrics import Metric

Kind = Literal["lines", "number", "pictures", "table"]


@dataclass(frozen=True)
class Chart:
    """One panel."""

    title: str
    keys: tuple[str, ...] = ()
    pattern: str | None = None
    """Regular expression of the keys, instead of `keys`: a line per layer."""
    kind: Kind = "lines"
    unit: str | None = None
    """Label of the y axis."""
    top: float | None = None
    """End of the y axis, which then starts at 0."""
    log: bool = False
    marks: tuple[str, ...] = ()
    """Those of `keys` that are events: points instead of lines."""


@dataclass(frozen=True)
class Section:
    """Charts that answer one question."""

    name: str
    question: str
    charts: tuple[Chart, ...]


def _number(title: str, metric: Metric) -> Chart:
    return Chart(title, (metric.key,), kind="number")


def _charts(section: str) -> tuple[Chart, ...]:
    """The charts of a section, as the registry of metrics describes them."""
    return tuple(_chart(chart, shown) for chart, shown in metrics.charts().items() if chart.section == section)


def _chart(chart: metrics.Chart, shown: list[Metric]) -> Chart:
    marks = tuple(metric.key for metric in shown if metric.event)
    title = f"{chart.title} (points: layers swapped)" if marks else chart.title
    panel = Chart(title, tuple(metric.key for metric in shown), unit=chart.unit or None, marks=marks)
    if any(metric.per_layer for metric in shown):
        pattern = shown[0].pattern if len(shown) == 1 else f"({'|'.join(metric.pattern for metric in shown)})"
        panel = replace(panel, keys=(), pattern=pattern)
    return replace(panel, top=chart.top, log=chart.log)


SECTIONS = (
    Section(
        "At a glance",
        "How far has pruning come, and what did it cost? Runs with and without pruning share the charts of the loss.",
        (
            _number("Pruned", metrics.SPARSITY),
            _number("Layers on sparse kernels", metrics.SPARSE_LAYERS),
            _number("KV cache that can go", metrics.KV_SHARE),
            Chart("Training loss", (*loss_keys("training"), "dense/train_loss"), unit="loss"),
            Chart("Held-out loss", loss_keys("validation"), unit="loss"),
            *_charts("Overview"),
        ),
    ),
    Section(
        "Patterns",
        "Which connections are left? Darker blue: higher score. Grey: pruned. Orange: regrown, pink: just pruned.",
        (
            Chart("Atlas: a column per layer, a row per head", ("patterns/atlas",), kind="pictures"),
            Chart("Layers and heads", ("patterns/heads",), kind="table"),
        ),
    ),
    Section(
        "Layers",
        "Which layers give up connections, and have they settled? A layer settles under settle/min_delta.",
        _charts("Layers"),
    ),
    Section(
        "Speed and savings",
        "What did it save? A step gets faster where layers are swapped; FLOPs and KV bytes are estimates.",
        _charts("Speed and savings"),
    ),
)
"""The dashboard, top to bottom."""

AXIS = "trainer/global_step"
COLUMNS = ("final/sparsity", "val/loss.last", "val_loss.last", "final/sparse_layers", "final/settled_layers")
"""Summary values beside the names of runs."""
