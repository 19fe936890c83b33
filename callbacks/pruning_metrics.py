"""The state of pruning as numbers for loggers: metrics under their keys, the table of heads, the summary of a run."""

from __future__ import annotations

from typing import Any

from sparse_prune.callbacks.kernel_swap import SwapEvent
from sparse_prune.pruner import AttentionPruner, PruneReport, attention_flops, kv_blocks_droppable


def layer_numbers(pruner: AttentionPruner) -> dict[str, int]:
    """Layer -> its number in keys, in the order of the model."""
    return {name: number for number, name in enumerate(pruner.layers)}


def decision_metrics(report: PruneReport, pruner: AttentionPruner) -> dict[str, float]:
    """What one decision was made by, and how far the patterns moved."""
    numbers = layer_numbers(pruner)
    metrics = {
        "settle/min_delta": pruner.min_delta,
        "prune/threshold": report.threshold,
        "prune/requested": report.requested,
    }
    return metrics | {f"settle/change_layer_{numbers[name]:02d}": value for name, value in report.change.items()}


def pattern_metrics(pruner: AttentionPruner, report: PruneReport) -> dict[str, float]:
    """The patterns in force: how sparse they are, what attention they keep, what they save. Swaps change them too.

    Args:
        pruner: As it is now.
        report: The latest decision; layers that were given back since keep all attention.
    """
    numbers = layer_numbers(pruner)
    sparsity = {name: pattern.sparsity for name, pattern in pruner.patterns.items()}
    kept = {name: 1.0 if pruner.layers[name].restored else mass for name, mass in report.mass_kept.items()}
    metrics = {"sparsity/total": pruner.total_sparsity, "mass/kept": sum(kept.values()) / len(kept)}
    metrics |= {f"sparsity/layer_{numbers[name]:02d}": value for name, value in sparsity.items()}
    metrics |= {f"mass/kept_layer_{numbers[name]:02d}": value for name, value in kept.items()}
    return metrics | savings_metrics(pruner)


def swap_metrics(fresh: list[SwapEvent], swaps: list[SwapEvent], pruner: AttentionPruner) -> dict[str, float]:
    """New swaps as metrics; `swaps` are all of them."""
    numbers = layer_numbers(pruner)
    metrics = {f"swap/layer_{numbers[event.layer]:02d}": float(event.backend != "dense") for event in fresh}
    return metrics | {"swap/sparse_layers": float(sum(event.backend != "dense" for event in swaps))}


def savings_metrics(pruner: AttentionPruner) -> dict[str, float]:
    """Estimates of what the patterns save: FLOPs of one forward pass, and KV cache after it."""
    flops = flops_dense = 0
    bytes_saved = bytes_dense = 0.0
    for state in pruner.layers.values():
        layer, pattern = state.layer, state.layer.pattern
        if pattern is None or layer.last_shape is None:
            continue
        shape = layer.last_shape
        kept, possible = attention_flops(pattern, shape.head_dim, shape.batch)
        flops, flops_dense = flops + kept, flops_dense + possible
        if layer.causal:
            cache = 2 * shape.batch * layer.num_kv_heads * pattern.kv_len * shape.head_dim * shape.dtype.itemsize
            bytes_dense += cache
            bytes_saved += cache * kv_blocks_droppable(pattern, layer.num_kv_heads)
    metrics = {}
    if flops_dense:
        metrics["savings/attention_flops"] = float(flops_dense - flops)
        metrics["savings/attention_flops_share"] = 1.0 - flops / flops_dense
    if bytes_dense:
        metrics["savings/kv_bytes"] = bytes_saved
        metrics["savings/kv_share"] = bytes_saved / bytes_dense
    return metrics


HEAD_COLUMNS = ("layer", "head", "sparsity", "mass kept", "change", "settled at", "backend")


def head_table(pruner: AttentionPruner, events: list[SwapEvent]) -> list[list[Any]]:
    """A row per layer and head, with the columns of `HEAD_COLUMNS`."""
    backends = {event.layer: event.backend for event in events}
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
    """The end of a run in a few numbers."""
    settled = sum(state.settled_at is not None for state in pruner.layers.values())
    return {
        "final/sparsity": pruner.total_sparsity,
        "final/settled_layers": float(settled),
        "final/sparse_layers": float(sum(state.layer.mode == "sparse" for state in pruner.layers.values())),
        "final/layers": float(len(pruner.layers)),
    }
