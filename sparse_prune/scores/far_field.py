"""Far field: by how much the loss rises when a head sees no further than its sinks and its neighbourhood."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_prune.scores.call import Per, Tile
from sparse_prune.scores.score import Score, Sees


class FarField(Score):
    """Rise of the loss when a head loses all of its far field at once, to first order in the output; signed.

    With o the output, s the output if a row saw only its sinks and its nearest blocks, and g the gradient of the loss
    in o, it is the sum over rows of g.(s - o). It is a score of a head, not of single blocks: the rise for a block of
    rows stands in the first column, and the other columns are 0.

    Args:
        sink_blocks: First key blocks that are not far.
        recent_blocks: Key blocks up to and including the diagonal that are not far.
    """

    sees: ClassVar[Sees] = "gradient"
    per: ClassVar[Per] = "call"
    signed: ClassVar[bool] = True

    def __init__(self, sink_blocks: int = 1, recent_blocks: int = 2) -> None:
        self.sink_blocks, self.recent_blocks = sink_blocks, recent_blocks

    def add(self, tile: Tile) -> Tensor:
        """Sum the rises over rows and samples, in the first column."""
        near, share = self._near(tile), tile.weights * tile.gradient_by_key
        left = (tile.weights * near).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        rise = (share * near).sum(-1) / left - share.sum(-1)
        total = rise.masked_fill(~tile.valid, 0.0).sum((0, 2), dtype=torch.float64)
        return torch.nn.functional.pad(total[:, None], (0, tile.kv_blocks - 1))

    def _near(self, tile: Tile) -> Tensor:
        """Mark the keys that are not far from a query: boolean, (rows, seen)."""
        call, device = tile.call, tile.logits.device
        side, offset = call.block_size[1], call.key.shape[2] - call.query.shape[2] if call.causal else 0
        own = (torch.arange(tile.start, tile.stop, device=device)[:, None] + offset) // side
        block = torch.arange(tile.seen, device=device) // side
        return (block < self.sink_blocks) | ((own - block).abs() < self.recent_blocks)

    def __repr__(self) -> str:
        return f"FarField(sink_blocks={self.sink_blocks}, recent_blocks={self.recent_blocks})"
