"""The running average of scores that decisions use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_prune.codec import compress, decompress
from sparse_prune.ranges import check_range
from sparse_prune.scores.statistics import BlockStatistics, grown


class ScoreAverage:
    """Exponential moving average of one kind of block statistics: decayed sums over decayed weights.

    The ratio needs no bias correction. Blocks that a shorter batch does not reach keep their average; blocks
    never seen score infinity, so that nothing unknown is pruned.

    Raises:
        ValueError: If `decay` is outside [0, 1]. 1 gives a plain mean.
    """

    def __init__(self, kind: str, decay: float) -> None:
        check_range("[0, 1]", decay=decay)
        self.kind, self.decay = kind, decay
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    def update(self, statistics: BlockStatistics) -> None:
        """Add the statistics of one optimizer step."""
        total, weight = statistics.of(self.kind)
        if self._sum is None or self._weight is None:
            self._sum, self._weight = total.clone(), weight.expand(-1, *total.shape[1:]).clone()
            return
        heads = max(len(self._weight), len(weight))
        rows, cols = (max(self._sum.shape[i], total.shape[i]) for i in (1, 2))
        if (heads, rows, cols) != self._weight.shape:
            self._sum, self._weight = (grown(x, rows, cols) for x in (self._sum, self._weight.expand(heads, -1, -1)))
        corner = (slice(None), slice(total.shape[1]), slice(total.shape[2]))
        # Rows that were not seen keep their sums: they add nothing, either.
        fade = torch.full_like(weight, self.decay).masked_fill_(weight <= 0, 1.0)
        self._weight[corner].mul_(fade).add_(weight)
        self._sum[corner].mul_(fade).add_(total)

    @property
    def empty(self) -> bool:
        """Whether nothing was probed yet."""
        return self._sum is None

    @property
    def shape(self) -> torch.Size:
        """Shape of the scores, (num_heads, q_blocks, kv_blocks).

        Raises:
            RuntimeError: If nothing was probed yet.
        """
        return self._known()[0].shape

    def value(self) -> Tensor:
        """Return the scores, float32, (num_heads, q_blocks, kv_blocks).

        Raises:
            RuntimeError: If nothing was probed yet.
        """
        total, weight = self._known()
        return (total / weight).float().masked_fill_(weight <= 0, torch.inf)

    def _known(self) -> tuple[Tensor, Tensor]:
        if self._sum is None or self._weight is None:
            raise RuntimeError("No scores yet: probe at least one training step first.")
        return self._sum, self._weight

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the sums, compressed, and of the weights, (1 or num_heads, q_blocks, kv_blocks)."""
        if self._sum is None or self._weight is None:
            return {"sum": None, "weight": None}
        return {"sum": compress(self._sum), "weight": self._weight.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        total, weight = state["sum"], state["weight"]
        self._sum = None if total is None else decompress(total).clone()
        # Older state has no heads here.
        self._weight = None if weight is None else weight.reshape(-1, *weight.shape[-2:]).clone()
