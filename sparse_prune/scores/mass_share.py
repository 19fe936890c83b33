"""Mass share: the share of a row's mass in a block and all weaker ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune.scores.row_mass import Mean


class MassShare(Mean):
    """Share of its row's mean mass that a block and all weaker blocks hold, in [0, 1].

    Keeping blocks that score at least t keeps the fewest blocks that hold more than 1 - t of each row's mean mass.
    """

    def value(self, average: Tensor) -> Tensor:
        """Convert mean masses to shares."""
        return row_mass(average)


def row_mass(scores: Tensor) -> Tensor:
    """Convert scores to the share of its row's score that a block and all weaker blocks hold, in [0, 1].

    This is the per-row cumulative-mass criterion as a transform of scores.

    Args:
        scores: (num_heads, q_blocks, kv_blocks), non-negative.
    """
    finite = torch.where(scores.isinf(), 0.0, scores)
    ordered, order = finite.sort(dim=-1)
    total = ordered.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    tail = torch.empty_like(scores).scatter_(-1, order, ordered.cumsum(-1) / total)
    return torch.where(scores.isinf(), scores, tail)
