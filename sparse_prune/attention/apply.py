"""Patterns put on a model: those of a file, of another run, or made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_prune.attention.access import attach
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.kernels import check_backend, usable_backend
from sparse_prune.pattern import BlockPattern


def apply_patterns(
    model: nn.Module, patterns: Mapping[str, BlockPattern], *, example: Any = None, backend: str | None = None
) -> list[PrunableAttention]:
    """Let the layers of a model skip the blocks that patterns leave out; nothing changes if one does not fit.

    Training goes on with these patterns: to move them, add `AttentionPruning`.

    Args:
        model: Any module; it is taken over if it was not yet.
        patterns: Layer -> pattern, as `sparse_prune.export.load_patterns` reads them. Layers without one stay as they
            are. Names are those in `model`: patterns of a run begin with the LightningModule's attribute.
        example: See `list_layers`.
        backend: One of `sparse_prune.kernels.BACKENDS`; None: "triton" where there is a GPU, "gather" elsewhere.

    Returns:
        The layers that got a pattern.

    Raises:
        ValueError: If a layer does not exist, or has other heads or another causality than its pattern, or the backend
            is unknown.
    """
    chosen = usable_backend("triton") if backend is None else backend
    check_backend(chosen)
    layers = fitting_layers(model, patterns, example)
    for name, layer in layers.items():
        layer.pattern, layer.backend = patterns[name], chosen
        layer.mode = "sparse" if patterns[name].kept_blocks < patterns[name].possible_count else "dense"
    return list(layers.values())


def fitting_layers(
    model: nn.Module, patterns: Mapping[str, BlockPattern], example: Any = None
) -> dict[str, PrunableAttention]:
    """The layers of a model that patterns belong to, by name.

    Args:
        model: Any module; it is taken over if it was not yet.
        patterns: Layer -> pattern.
        example: See `list_layers`.

    Raises:
        ValueError: If a layer does not exist, or has other heads or another causality than its pattern.
    """
    layers = {layer.name: layer for layer in attach(model, example)}
    if missing := sorted(patterns.keys() - layers.keys()):
        raise ValueError(
            f"The patterns are of another model: they name layers {missing[:4]}, this one has {list(layers)[:4]}. Give "
            "the module that was pruned: names begin with that of the model in it."
        )
    for name, pattern in patterns.items():
        there, here = (pattern.num_heads, pattern.causal), (layers[name].num_heads, layers[name].causal)
        if there != here:
            raise ValueError(
                f"The patterns are of another model: layer {name!r} has (heads, causal) {there} there, {here} here."
            )
    return {name: layers[name] for name in patterns}
