"""The charts of a dashboard, in the order and words of `sparse-prune report`; `views` makes W&B panels of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sparse_prune import metrics
from sparse_prune.losses import TWIN, loss_keys
from sparse_prune.metrics import Metric

Kind = Literal["lines", "number", "pictures", "table", "parallel"]


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
    """Those of `keys` that are events, drawn as points."""
    settings: tuple[str, ...] = ()
    """Hyperparameters, the first axes of a "parallel" chart; `keys` are then the runs' last values."""


@dataclass(frozen=True)
class Section:
    """A section of charts that answer one question."""

    name: str
    question: str
    charts: tuple[Chart, ...]


_OF_TWIN = (metrics.STEP_SECONDS,)
"""Metrics that a recipe also logs for the dense twin, under `TWIN`."""


def _loss(title: str, stage: str) -> Chart:
    """Show the losses of the pruned run and the dense twin in one chart."""
    keys = loss_keys(stage)
    return Chart(title, (*keys, *(TWIN + key for key in keys)), unit="loss")


def _number(title: str, metric: Metric) -> Chart:
    return Chart(title, (metric.key,), kind="number")


def _charts(section: str) -> tuple[Chart, ...]:
    """Make the charts of a section, from the registry of metrics."""
    return tuple(_chart(chart, shown) for chart, shown in metrics.charts().items() if chart.section == section)


def _chart(chart: metrics.Chart, shown: list[Metric]) -> Chart:
    marks = tuple(metric.key for metric in shown if metric.event)
    title = f"{chart.title} (points: layers swapped)" if marks else chart.title
    twin = tuple(TWIN + metric.key for metric in shown if metric in _OF_TWIN)
    panel = Chart(title, (*(metric.key for metric in shown), *twin), unit=chart.unit or None, marks=marks)
    if any(metric.per_layer for metric in shown):
        pattern = shown[0].pattern if len(shown) == 1 else f"({'|'.join(metric.pattern for metric in shown)})"
        panel = replace(panel, keys=(), pattern=pattern)
    return replace(panel, top=chart.top, log=chart.log)


SECTIONS = (
    Section(
        "At a glance",
        "How far has pruning come? Losses and step times stand beside those of the dense twin below.",
        (
            _number("Pruned", metrics.SPARSITY),
            _number("Layers on sparse kernels", metrics.SPARSE_LAYERS),
            _number("KV cache that can go", metrics.KV_SHARE),
        ),
    ),
    Section(
        "Patterns",
        "Which connections are left? Darker blue: higher score. Grey: pruned. Orange: regrown, pink: just pruned.",
        (Chart("Atlas: a column per layer, a row per head", ("patterns/atlas",), kind="pictures"),),
    ),
    Section(
        "Over the run",
        "What did it cost, and what did it save? The dense twin is the same fine-tune without pruning (dense/...).",
        (
            _loss("Training loss", "training"),
            _loss("Held-out loss", "validation"),
            *_charts("Over the run"),
        ),
    ),
    Section(
        "Layers",
        "Which layers give up connections, and have they settled? A layer settles under settle/min_delta.",
        (*_charts("Layers"), Chart("Layers and heads", ("patterns/heads",), kind="table")),
    ),
    Section(
        "Speed and savings",
        "What else did it save? FLOPs and KV bytes are estimates.",
        _charts("Speed and savings"),
    ),
)
"""The sections of the dashboard, top to bottom."""

SWEEP = Section(
    "How sparse can I go?",
    "A line per run, from its settings to what it lost. Drag over an axis to keep the runs that pass there.",
    (
        Chart(
            "Settings and loss",
            (metrics.SPARSITY.key, metrics.STEP_SECONDS.key, "val/passkey_accuracy", "val/loss.last"),
            kind="parallel",
            settings=("pruning/sparsity", "pruning/sparsity/final", "pruning/score", "pruning/statistic"),
        ),
    ),
)
"""The first section if several runs are shown."""

AXIS = "trainer/global_step"
COLUMNS = ("final/sparsity", "val/loss.last", "val_loss.last", "final/sparse_layers", "final/settled_layers")
"""Summary values in the list of runs."""
