"""Describes every head for the page: how sparse it is, how far it reaches, and which rule kept its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparse_prune.pattern import BlockPattern


def describe_heads(pattern: BlockPattern, settings: Mapping[str, str]) -> dict[str, Any]:
    """Return lists with a number per head, as JSON types.

    Args:
        pattern: The pattern of a layer.
        settings: The settings of the run; its `Constraints` keep first and recent blocks of every row.

    Returns:
        heads: Share of possible blocks pruned.
        reach: Tokens from a row's own block to the furthest block that it keeps, sinks excepted; median of the rows.
        sink, recent: Shares of the kept blocks that these constraints keep; scores chose the rest.
    """
    keep, possible = pattern.keep, pattern.possible
    _, rows, cols = keep.shape
    block_q, block_kv = pattern.block_size
    own = (torch.arange(rows) * block_q + (pattern.kv_len - pattern.q_len) * pattern.causal) // block_kv
    away = (own[:, None] - torch.arange(cols)).abs()  # (rows, cols), in key blocks
    sinks = _count(settings, "sink_blocks")
    sink = (torch.arange(cols) < sinks).expand(rows, cols) & possible
    recent = (away < _count(settings, "recent_blocks")) & possible & ~sink
    reach = ((keep & ~sink) * away).amax(-1).median(-1).values * block_kv
    kept = keep.sum((1, 2)).clamp(min=1)
    return {
        "heads": [round(share, 4) for share in pattern.head_sparsity.tolist()],
        "reach": reach.tolist(),
        "sink": [round(share, 3) for share in ((keep & sink).sum((1, 2)) / kept).tolist()],
        "recent": [round(share, 3) for share in ((keep & recent).sum((1, 2)) / kept).tolist()],
    }


def _count(settings: Mapping[str, str], name: str) -> int:
    """Return the number of blocks that a constraint keeps; 0 if the logs do not tell."""
    text = settings.get(f"pruning/constraints/{name}", "")
    return int(text) if text.isdecimal() else 0
