"""Which charts a pruning run deserves, in what order. Says nothing of W&B: that is in `views`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_prune.callbacks.losses import loss_keys

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


SECTIONS = (
    Section(
        "At a glance",
        "How far has pruning come, and what did it cost? Runs with and without pruning share the charts of the loss.",
        (
            Chart("Pruned", ("sparsity/total",), kind="number"),
            Chart("Layers on sparse kernels", ("swap/sparse_layers",), kind="number"),
            Chart("KV cache that can go", ("savings/kv_share",), kind="number"),
            Chart("Training loss", (*loss_keys("training"), "dense/train_loss"), unit="loss"),
            Chart("Held-out loss", loss_keys("validation"), unit="loss"),
            Chart("Share of blocks pruned", ("prune/requested", "sparsity/total"), unit="share", top=1.0),
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
        (
            Chart("Sparsity per layer", pattern=r"sparsity/layer_\d+", unit="share", top=1.0),
            Chart(
                "Change per decision", pattern=r"settle/(change_layer_\d+|min_delta)", unit="Jaccard distance", top=1.0
            ),
            Chart("Attention kept per layer", pattern=r"mass/kept_layer_\d+", unit="share of probability"),
            Chart("Attention kept", ("mass/kept",), unit="share of probability"),
            Chart("Threshold on scores", ("prune/threshold",), unit="score", log=True),
            Chart("Swaps: 1 to sparse, 0 back to dense", pattern=r"swap/layer_\d+", top=1.0),
        ),
    ),
    Section(
        "Speed and savings",
        "What did it save? A step gets faster where layers are swapped; FLOPs and KV bytes are estimates.",
        (
            Chart(
                "Step time (points: layers swapped)",
                ("time/step_seconds", "time/step_seconds_at_swap"),
                unit="s",
                marks=("time/step_seconds_at_swap",),
            ),
            Chart("Layers on sparse kernels over time", ("swap/sparse_layers",), unit="layers"),
            Chart(
                "Tokens per second (points: layers swapped)",
                ("time/tokens_per_second", "time/tokens_per_second_at_swap"),
                unit="tokens/s",
                marks=("time/tokens_per_second_at_swap",),
            ),
            Chart(
                "Share saved", ("savings/attention_flops_share", "savings/kv_share"), unit="share, estimate", top=1.0
            ),
            Chart("Attention FLOPs saved per forward pass", ("savings/attention_flops",), unit="FLOP, estimate"),
            Chart("KV cache saved", ("savings/kv_bytes",), unit="bytes, estimate"),
        ),
    ),
)
"""The dashboard, top to bottom."""

AXIS = "trainer/global_step"
COLUMNS = ("final/sparsity", "val/loss.last", "val_loss.last", "final/sparse_layers", "final/settled_layers")
"""Summary values beside the names of runs."""
