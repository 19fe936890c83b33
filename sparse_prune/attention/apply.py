"""Puts patterns on a model: those of a file, of another run, or made by hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_prune.attention.access import attach
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.prefixes import renamings
from sparse_prune.kernels import check_backend, usable_backend
from sparse_prune.pattern import BlockPattern

log = logging.getLogger(__name__)


def apply_patterns(
    model: nn.Module, patterns: Mapping[str, BlockPattern], *, example: Any = None, backend: str | None = None
) -> list[PrunableAttention]:
    """Let the layers of a model skip the blocks that patterns prune; nothing changes if one does not fit.

    Training keeps these patterns: to change them, add `AttentionPruning`.

    Args:
        model: Any module; it is attached if it is not yet.
        patterns: Layer -> pattern, as `sparse_prune.export.load_patterns` reads them. Layers without one stay as they
            are. Names are those in `model`, or differ from them by one prefix, such as the LightningModule's attribute:
            a log line then tells what was matched.
        example: See `list_layers`.
        backend: One of `sparse_prune.kernels.BACKENDS`; None: "triton" where there is a GPU, "gather" elsewhere.

    Returns:
        The layers that got a pattern.

    Raises:
        ValueError: If a layer does not exist, is ambiguous, or differs from its pattern in heads or causality, or if
            the backend is unknown.
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
    """Return the layers of a model that patterns belong to, by the patterns' names; as `apply_patterns` finds them."""
    layers = {layer.name: layer for layer in attach(model, example)}
    names = _names_here(list(patterns), list(layers))
    for name, pattern in patterns.items():
        layer = layers[names[name]]
        there, here = (pattern.num_heads, pattern.causal), (layer.num_heads, layer.causal)
        if there != here:
            raise ValueError(
                f"The patterns are of another model: layer {name!r} has (heads, causal) {there} there, {here} here. "
                "Give the module that was pruned."
            )
    return {name: layers[names[name]] for name in patterns}


def _names_here(there: list[str], here: list[str]) -> dict[str, str]:
    """Map every pattern's name to a layer's: the same one, or the one that differs by a prefix common to all.

    Raises:
        ValueError: If a layer does not exist, or if several prefixes fit.
    """
    if set(there) <= set(here):
        return {name: name for name in there}
    # If both have a prefix of their own, they are the same only if all layers match.
    ways = {
        (cut, put): names
        for (cut, put), names in renamings(there, here).items()
        if not (cut and put) or len(there) == len(here)
    }
    if len(ways) == 1:
        [((cut, put), names)] = ways.items()
        log.info("Patterns of layers %r are matched with layers %r of this model.", f"{cut}...", f"{put}...")
        return names
    missing = sorted(set(there) - set(here))
    ways_in_words = f" in {len(ways)} ways, by the prefixes {[put for _, put in ways]}" if ways else ""
    raise ValueError(
        f"The patterns are of another model: they name layers {missing[:4]}, this one has {list(here)[:4]}"
        f"{ways_in_words}. Give the module that was pruned, or patterns with the names of this one's layers."
    )
