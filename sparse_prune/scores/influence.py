"""Influence: the rise of the loss when a block is pruned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_prune.scores.call import Per, Tile
from sparse_prune.scores.score import Score, Sees

LEAST_REST = 1e-3
"""Least mass of a row outside a block: below it, rounding errors would dominate the quotient."""
LARGEST_LOGIT = 60.0
"""Largest logit above those of the kept keys: its exponential still adds up in float32."""


class Influence(Score):
    """Rise of the loss when a block is pruned for all its rows, to first order in the output; signed.

    Let P be the attention over the keys that a row keeps, g the gradient of the loss in the output o, and
    dS = P * (g.v - g.o). Pruning block B changes the output to (o - sum over B of P v) / (1 - m), where m is the row's
    mass in B, and so the loss by -sum over B of dS / (1 - m). The score of a pruned block is the fall of the loss if it
    came back: the same sum over 1 + m, with P = exp(logit - lse of the kept keys). Both are exact if the loss is linear
    in the output.

    Scores are sums over the rows and samples of a call, averaged over calls. They are comparable between layers and
    heads, and the threshold is the rise of the batch's loss, in its unit, from which on a block is kept.
    """

    sees: ClassVar[Sees] = "gradient"
    per: ClassVar[Per] = "call"
    signed: ClassVar[bool] = True
    kernel: ClassVar[str | None] = "sparse_prune.kernels.triton.attend:influence"

    def add(self, tile: Tile) -> Tensor:
        """Sum the rises over rows and samples."""
        kept = tile.kept[:, None]  # (num_heads, 1, kv_blocks)
        kept_keys = tile.per_key(kept) & tile.mask
        lse = tile.logits.masked_fill(~kept_keys, -torch.inf).logsumexp(-1, keepdim=True)
        holds = tile.per_block(kept_keys.float()) > 0
        # A row that keeps no other block has no softmax without this one, so that its change is not defined.
        stays = holds.sum(-1, keepdim=True) > holds.int()
        weights = (tile.logits - lse).clamp(max=LARGEST_LOGIT).exp() * tile.mask
        expected = (weights * tile.gradient_by_key).masked_fill(~kept_keys, 0.0).sum(-1, keepdim=True)
        change = tile.per_block(weights * (tile.gradient_by_key - expected))
        mass = tile.per_block(weights)
        rest = torch.where(kept, (1.0 - mass).clamp_min(LEAST_REST), 1.0 + mass)
        return -(change / rest).masked_fill(~stays, 0.0).sum((0, 2), dtype=torch.float64)
