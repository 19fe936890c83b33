"""Output change: the distance by which a head's output moves without a block."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_prune.scores.call import Per, Tile
from sparse_prune.scores.score import Score, Sees


class OutputChange(Score):
    """Distance by which a row's output moves without the block, to first order in its mass: the largest of a sample's
    rows, averaged over samples. In units of values."""

    sees: ClassVar[Sees] = "values"
    per: ClassVar[Per] = "sample"

    def add(self, tile: Tile) -> Tensor:
        """Sum the largest distance of each sample."""
        batch, heads, rows, _ = tile.weights.shape
        kv_heads, head_dim = tile.values.shape[1], tile.values.shape[3]
        width, side = tile.kv_blocks, tile.call.block_size[1]
        padding = width * side - tile.seen
        weights = torch.nn.functional.pad(tile.weights, (0, padding))
        values = torch.nn.functional.pad(tile.values, (0, 0, 0, padding))
        weights = weights.view(batch, kv_heads, heads // kv_heads, rows, width, side)
        parts = torch.einsum("bkgrws,bkwsd->bkgrwd", weights, values.view(batch, kv_heads, width, side, head_dim))
        held = parts.reshape(batch, heads, rows, width, head_dim)  # each block's part of the output
        moved = (tile.mass.float()[..., None] * held.sum(3, keepdim=True) - held).norm(dim=-1)
        changes: Tensor = moved.amax(2).sum(0)
        return changes
