"""The metrics of pruning: key, meaning, unit and chart of each. Logger, dashboard, report and docs read this file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner
from sparse_prune.reports import table
from sparse_prune.swap_event import SwapEvent

Style = Literal["main", "second", "accent", "muted", "thin"]
Section = Literal["Over the run", "Layers", "Speed and savings"]


@dataclass(frozen=True)
class Chart:
    """A chart of one or several metrics."""

    title: str
    unit: str
    """Label of the y axis."""
    section: Section
    top: float | None = None
    """End of the y axis, which then starts at 0."""
    log: bool = False
    """Whether the y axis is logarithmic."""
    on_page: bool = True
    """Whether `sparse-prune report` draws it; its table of layers may say the same."""


@dataclass(frozen=True, eq=False)
class Moment:
    """The state of a run that metrics are read from."""

    pruner: AttentionPruner
    """The pruner."""
    report: PruneReport
    """The latest decision."""
    fresh: Sequence[SwapEvent] = ()
    """Swaps that were not logged yet."""
    swaps: Sequence[SwapEvent] = ()
    """All swaps of the run."""

    @cached_property
    def kept(self) -> dict[str, float]:
        """Layer -> share of attention in kept blocks; layers that were reverted since the decision keep all."""
        layers = self.pruner.layers
        return {name: 1.0 if layers[name].reverted else mass for name, mass in self.report.mass_kept.items()}

    @cached_property
    def savings(self) -> dict[str, float]:
        """The estimates of the function `savings`."""
        return savings(self.pruner)


Value = float | Mapping[str, float] | None
"""A number, a number per layer, or None if there is nothing to log."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Raises:
        ValueError: If only one of `at` and `read` is given.
    """

    key: str
    """Key in logs; NN stands for the number of a layer, with at least two digits."""
    meaning: str
    """Description for the docs."""
    label: str
    """Name in the legend of the chart."""
    chart: Chart
    style: Style = "main"
    """Style of the line."""
    event: bool = False
    """Whether the values are points in time instead of a curve."""
    at: Literal["decision", "pattern", "swap"] | None = None
    """When `SparsityLogger` logs it: after a decision; whenever patterns changed; at a swap. None: others log it."""
    read: Callable[[Moment], Value] | None = None
    """Reads the value from a moment."""

    def __post_init__(self) -> None:
        if (self.at is None) != (self.read is None):
            raise ValueError(f"`at` and `read` must be given together, got {self.at!r} and {self.read!r}.")

    @property
    def per_layer(self) -> bool:
        """Whether every layer has a value."""
        return self.key.endswith("NN")

    @property
    def pattern(self) -> str:
        """Regular expression that matches its keys."""
        return re.escape(self.key).replace("NN", r"\d+")

    def of_layer(self, number: int) -> str:
        """Return the key of a layer."""
        return self.key.replace("NN", f"{number:02d}")

    def keys(self, logged: Iterable[str]) -> list[str]:
        """Return its keys among those of a run, in the order of the layers' numbers."""
        return sorted((key for key in logged if re.fullmatch(self.pattern, key)), key=lambda key: (len(key), key))


PRUNED = Chart("Share of blocks pruned", "share of blocks", "Over the run", top=1.0)
PRUNED_LAYERS = Chart("Sparsity per layer", "share of blocks", "Over the run", top=1.0)
STEP_TIME = Chart("Step time", "seconds", "Over the run")
CHANGE = Chart("Change per decision", "Jaccard distance", "Layers", top=1.0)
KEPT_LAYERS = Chart("Attention kept per layer", "share of probability", "Layers", on_page=False)
KEPT = Chart("Attention kept", "share of probability", "Layers")
CUT = Chart("Threshold on scores", "score", "Layers", log=True)
SWAPPED_LAYERS = Chart("Swaps: 1 to sparse, 0 back to dense", "", "Layers", top=1.0, on_page=False)
SWAPPED = Chart("Layers on sparse kernels over time", "layers", "Speed and savings", on_page=False)
SPEED = Chart("Tokens per second", "tokens per second", "Speed and savings")
SAVED = Chart("Share saved", "share, estimate", "Speed and savings", top=1.0)
FLOPS = Chart("Attention FLOPs saved per forward pass", "FLOP, estimate", "Speed and savings")
BYTES = Chart("KV cache saved", "bytes, estimate", "Speed and savings")

REQUESTED = Metric(
    "prune/requested", "value of the schedule", "requested", PRUNED, "muted",
    at="decision", read=lambda now: now.report.requested,
)  # fmt: skip
SPARSITY = Metric(
    "sparsity/total", "share of possible blocks pruned, over all layers and heads", "achieved", PRUNED,
    at="pattern", read=lambda now: now.pruner.total_sparsity,
)  # fmt: skip
LAYER_SPARSITY = Metric(
    "sparsity/layer_NN", "the same of a layer", "layer", PRUNED_LAYERS, "thin",
    at="pattern", read=lambda now: {name: pattern.sparsity for name, pattern in now.pruner.patterns.items()},
)  # fmt: skip
LAYER_CHANGE = Metric(
    "settle/change_layer_NN", "change of a layer's pattern at a decision", "layer", CHANGE, "thin",
    at="decision", read=lambda now: now.report.change,
)  # fmt: skip
MIN_DELTA = Metric(
    "settle/min_delta", "the line under which a layer settles", "settles below", CHANGE, "accent",
    at="decision", read=lambda now: now.pruner.min_delta,
)  # fmt: skip
LAYER_MASS = Metric(
    "mass/kept_layer_NN", "share of a layer's attention probability in kept blocks", "layer", KEPT_LAYERS, "thin",
    at="pattern", read=lambda now: now.kept,
)  # fmt: skip
MASS = Metric(
    "mass/kept", "the same, mean of the layers", "kept", KEPT,
    at="pattern", read=lambda now: sum(now.kept.values()) / len(now.kept),
)  # fmt: skip
THRESHOLD = Metric(
    "prune/threshold", "cut-off on scores in force", "threshold", CUT,
    at="decision", read=lambda now: now.report.threshold,
)  # fmt: skip
LAYER_SWAP = Metric(
    "swap/layer_NN", "1 when a layer goes to block-sparse attention, 0 when it goes back to dense", "layer",
    SWAPPED_LAYERS, "thin",
    at="swap", read=lambda now: {swap.layer: float(swap.backend != "dense") for swap in now.fresh},
)  # fmt: skip
SPARSE_LAYERS = Metric(
    "swap/sparse_layers", "how many layers are block-sparse", "sparse", SWAPPED,
    at="swap", read=lambda now: float(sum(swap.backend != "dense" for swap in now.swaps)),
)  # fmt: skip
STEP_SECONDS = Metric(
    "time/step_seconds", "of this process, mean of the last `Trainer.log_every_n_steps` steps", "pruned", STEP_TIME
)
TOKENS_PER_SECOND = Metric("time/tokens_per_second", "the same in tokens", "pruned", SPEED)
STEP_SECONDS_AT_SWAP = Metric(
    "time/step_seconds_at_swap", "the last before layers are swapped: marks on the curve", "swapped", STEP_TIME,
    "accent", event=True,
)  # fmt: skip
TOKENS_PER_SECOND_AT_SWAP = Metric(
    "time/tokens_per_second_at_swap", "the last before layers are swapped: marks on the curve", "swapped", SPEED,
    "accent", event=True,
)  # fmt: skip
FLOPS_SHARE: Metric = Metric(
    "savings/attention_flops_share", "share of attention's FLOPs that pruned blocks save, an estimate",
    "attention FLOPs", SAVED,
    at="pattern", read=lambda now: now.savings.get(FLOPS_SHARE.key),
)  # fmt: skip
KV_SHARE: Metric = Metric(
    "savings/kv_share", "share of the KV cache that no later token needs, an estimate", "KV cache", SAVED, "accent",
    at="pattern", read=lambda now: now.savings.get(KV_SHARE.key),
)  # fmt: skip
FLOPS_SAVED: Metric = Metric(
    "savings/attention_flops", "FLOPs saved in one forward pass, an estimate", "saved", FLOPS,
    at="pattern", read=lambda now: now.savings.get(FLOPS_SAVED.key),
)  # fmt: skip
KV_BYTES: Metric = Metric(
    "savings/kv_bytes", "bytes of the KV cache saved after one forward pass, an estimate", "saved", BYTES,
    at="pattern", read=lambda now: now.savings.get(KV_BYTES.key),
)  # fmt: skip

METRICS: tuple[Metric, ...] = tuple(value for value in tuple(vars().values()) if isinstance(value, Metric))
"""All metrics, in the order of the charts."""


def charts() -> dict[Chart, list[Metric]]:
    """Return all charts in order, each with its metrics."""
    found: dict[Chart, list[Metric]] = {}
    for metric in METRICS:
        found.setdefault(metric.chart, []).append(metric)
    return found


def measure(now: Moment, *at: str) -> dict[str, float]:
    """Read metrics; return them by their keys."""
    numbers = layer_numbers(now.pruner)
    found: dict[str, float] = {}
    for metric in METRICS:
        value = metric.read(now) if metric.read is not None and metric.at in at else None
        if isinstance(value, Mapping):
            found |= {metric.of_layer(numbers[name]): number for name, number in value.items()}
        elif value is not None:
            found[metric.key] = value
    return found


def savings(pruner: AttentionPruner) -> dict[str, float]:
    """Estimate what the patterns save: FLOPs of one forward pass, and the KV cache after it, by their keys."""
    flops = flops_dense = 0
    bytes_saved = bytes_dense = 0.0
    for state in pruner.layers.values():
        layer, pattern, shape = state.layer, state.layer.pattern, state.layer.last_shape
        if pattern is None or shape is None:
            continue
        kept, possible = pattern.flops(shape.head_dim, shape.value_dim)
        flops, flops_dense = flops + shape.batch * kept, flops_dense + shape.batch * possible
        if layer.causal:
            tokens = shape.batch * layer.num_kv_heads * pattern.kv_len
            cache = tokens * sum(shape.channels) * shape.dtype.itemsize
            bytes_dense += cache
            bytes_saved += cache * pattern.droppable_share(layer.num_kv_heads)
    found: dict[str, float] = {}
    if flops_dense:
        found |= {FLOPS_SAVED.key: float(flops_dense - flops), FLOPS_SHARE.key: 1.0 - flops / flops_dense}
    if bytes_dense:
        found |= {KV_BYTES.key: bytes_saved, KV_SHARE.key: bytes_saved / bytes_dense}
    return found


def layer_numbers(pruner: AttentionPruner) -> dict[str, int]:
    """Return layer -> its number in keys, in the order of the model."""
    return {name: number for number, name in enumerate(pruner.layers)}


def markdown_table() -> str:
    """Return the table of all metrics in docs/monitoring.md."""
    rows = [(f"`{metric.key}`", metric.meaning, metric.chart.unit or "0 or 1") for metric in METRICS]
    return table(("Key", "What it is", "Unit"), rows)


HEAD_COLUMNS = ("layer", "head", "sparsity", "mass kept", "change", "settled at", "backend")


def head_table(pruner: AttentionPruner, swaps: Sequence[SwapEvent]) -> list[list[Any]]:
    """Return a row per layer and head, with the columns `HEAD_COLUMNS`."""
    backends = {swap.layer: swap.backend for swap in swaps}
    rows: list[list[Any]] = []
    for name, state in pruner.layers.items():
        pattern = state.layer.pattern
        if pattern is None:
            continue
        rest = [state.tracker.change, state.settled_at, backends.get(name, state.layer.mode)]
        shares = zip(pattern.head_sparsity.tolist(), state.head_mass_kept, strict=True)
        rows += [[name, head, sparsity, kept, *rest] for head, (sparsity, kept) in enumerate(shares)]
    return rows


def summarize(pruner: AttentionPruner) -> dict[str, float]:
    """Summarize the end of a run in a few numbers."""
    settled = sum(state.settled_at is not None for state in pruner.layers.values())
    return {
        "final/sparsity": pruner.total_sparsity,
        "final/settled_layers": float(settled),
        "final/sparse_layers": float(sum(state.layer.mode == "sparse" for state in pruner.layers.values())),
        "final/layers": float(len(pruner.layers)),
    }
