"""Influence: by how much the loss rises when a block is taken away."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_prune.scores.call import Tile
from sparse_prune.scores.score import Per, Score, Sees

LEAST_REST = 1e-3
"""Of a row's mass outside a block: below, the quotient would be of rounding errors."""
LARGEST_LOGIT = 60.0
"""Above those of the kept keys: its exponential still adds up in float32."""


class Influence(Score):
    """Rise of the loss when a block is taken away from all its rows, to first order in the output; signed.

    With P the attention over what a row keeps, g the gradient of the loss in the output o, and dS = P * (g.v - g.o),
    taking block B away changes the output to (o - sum over B of P v) / (1 - m) where m is the row's mass in B, and so
    the loss by -sum over B of dS / (1 - m). A block that is pruned at present scores by how much the loss would fall
    if it were given back, with the same sum over 1 + m, where P = exp(logit - lse of what is kept). Both are exact
    where the loss is linear in the output.

    Scores are sums over the rows and samples of one call and averages over calls: they compare over layers and heads,
    and the threshold is the rise of the batch's loss, in its unit, at which a block is worth keeping.
    """

    sees: ClassVar[Sees] = "gradient"
    per: ClassVar[Per] = "call"
    signed: ClassVar[bool] = True

    def add(self, tile: Tile) -> Tensor:
        """Sum of the rises over rows and samples."""
        kept = tile.kept[:, None]  # (num_heads, 1, kv_blocks)
        kept_keys = tile.per_key(kept) & tile.mask
        lse = tile.logits.masked_fill(~kept_keys, -torch.inf).logsumexp(-1, keepdim=True)
        holds = tile.per_block(kept_keys.float()) > 0
        # A row that keeps nothing, or nothing else, has no softmax without the block: there the change has no meaning.
        stays = holds.sum(-1, keepdim=True) > holds.int()
        weights = (tile.logits - lse).clamp(max=LARGEST_LOGIT).exp() * tile.mask
        expected = (weights * tile.gradient_by_key).masked_fill(~kept_keys, 0.0).sum(-1, keepdim=True)
        change = tile.per_block(weights * (tile.gradient_by_key - expected))
        mass = tile.per_block(weights)
        rest = torch.where(kept, (1.0 - mass).clamp_min(LEAST_REST), 1.0 + mass)
        return -(change / rest).masked_fill(~stays, 0.0).sum((0, 2), dtype=torch.float64)
