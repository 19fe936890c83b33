"""The base class of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparse_prune.scores.call import AttentionCall, Per, Tile, mask_heads
from sparse_prune.scores.statistics import BlockStatistics, Statistic

Sees = Literal["keys", "values", "gradient"]


class Score(ABC):
    """Score of blocks of queries and keys: blocks with lower scores are pruned first.

    A subclass implements `add` in torch and sets the class variables below; it then works with every backend on every
    device. Sums and counts of all micro-batches and ranks are added up before they are divided, and averaged over
    decisions.
    """

    sees: ClassVar[Sees] = "keys"
    """Inputs of a probe: queries and "keys"; "values" too; or also the "gradient" of the loss in the output, which is
    known after the backward pass."""
    per: ClassVar[Per] = "row"
    """The unit to average over: query rows, samples, or calls of the layer."""
    signed: ClassVar[bool] = False
    """Whether scores may be negative. Selection then shares them by sums and means instead of maxima and geometric
    means (see `select`)."""
    statistic: ClassVar[Statistic | None] = None
    """The statistic of row mass whose average is the score; these are always collected. None: sums of its own."""
    kernel: ClassVar[str | None] = None
    """Function that collects the sums on a GPU, as "package.module:function", for calls that the Triton probe takes.
    Its arguments are those of `probe_score` after the score: query, key, value, gradient and block size, the rest by
    name. Subclasses do not inherit it. None: torch collects the sums."""

    @property
    def kind(self) -> str:
        """Name of the sums in `BlockStatistics` and in checkpoints."""
        return self.statistic or type(self).__name__

    @abstractmethod
    def add(self, tile: Tile) -> Tensor:
        """Compute what a block of queries adds to the sums.

        Args:
            tile: The queries, and the keys that they may see.

        Returns:
            (num_heads, kv_blocks of the tile), summed over samples and rows. Rows that are not `tile.valid` add 0.
        """

    def value(self, average: Tensor) -> Tensor:
        """Convert the average to the score.

        Args:
            average: float32, (num_heads, q_blocks, kv_blocks); infinite where nothing was seen, which stays infinite.

        Returns:
            The score, of the same shape.
        """
        return average

    @torch.no_grad()
    def probe(self, call: AttentionCall) -> BlockStatistics:
        """Return sums and counts of one call of a layer.

        Raises:
            ValueError: If `add` returns a wrong shape.
        """
        return collect(call, (self,), (self.per,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def collect(call: AttentionCall, scores: Sequence[Score], units: Sequence[Per]) -> BlockStatistics:
    """Collect the sums of scores over one call, one block of queries at a time, and counts of units.

    Raises:
        ValueError: If the `add` of a score returns a wrong shape.
    """
    device, heads = call.query.device, call.query.shape[1]
    sums = torch.zeros(len(scores), heads, call.q_blocks, call.kv_blocks, dtype=torch.float64, device=device)
    counts = torch.zeros(len(units), mask_heads(call.attn_mask), call.q_blocks, 1, dtype=torch.float64, device=device)
    for tile in call.tiles():
        for place, score in enumerate(scores):
            added = score.add(tile)
            if added.shape != (heads, tile.kv_blocks):
                raise ValueError(
                    f"`{type(score).__name__}.add` must return (num_heads, kv_blocks) = {(heads, tile.kv_blocks)}, got "
                    f"{tuple(added.shape)}. Sum `tile.per_block(...)` over samples and rows: `.sum((0, 2))`."
                )
            sums[place, :, tile.row, : tile.kv_blocks] = added
        for place, unit in enumerate(units):
            counts[place, :, tile.row, 0] = tile.count(unit)
    return BlockStatistics(sums, counts, tuple(score.kind for score in scores))
