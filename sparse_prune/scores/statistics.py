"""The statistics of probes: sums per block, and the counts that they are divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.pattern import num_blocks

Statistic = Literal["mean", "mean_square", "max"]
STATISTICS: tuple[Statistic, ...] = ("mean", "mean_square", "max")
_COUNTS = {"mean": 0, "mean_square": 0, "max": 1}  # kind -> its row of `counts`; other kinds have the last one


@dataclass
class BlockStatistics:
    """Sums over rows and samples, and counts, whose ratio is the average of a score; additive over batches and ranks.

    Row mass is the attention probability that one query gives to one key block; a query's masses sum to 1.
    """

    sums: Tensor
    """float64, (kinds, num_heads, q_blocks, kv_blocks): mass, squared mass, largest mass of each sample. Rows that were
    not seen are 0."""
    counts: Tensor
    """float64, (2, num_heads, q_blocks, kv_blocks): query rows seen, samples seen. The counts of a score with sums of
    its own come last, or alone. num_heads is 1 if the masks of all heads are alike. kv_blocks is 1 unless sequences are
    packed: then each key block counts the queries whose document reaches into it."""
    kinds: tuple[str, ...] = STATISTICS
    """Names of the parts of `sums`, in order."""

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        """Add two probes; the shorter one fills the top-left corner."""
        mine, theirs = self._alike(other)
        sums, counts = (a + b.to(a.device) for a, b in ((mine.sums, theirs.sums), (mine.counts, theirs.counts)))
        return BlockStatistics(sums, counts, self.kinds)

    def _alike(self, other: BlockStatistics) -> tuple[BlockStatistics, BlockStatistics]:
        """Return both with equally many blocks."""
        rows, cols = (max(self.sums.shape[i], other.sums.shape[i]) for i in (2, 3))
        return self.grown(rows, cols), other.grown(rows, cols)

    def grown(self, rows: int, cols: int) -> BlockStatistics:
        """Extend to more blocks, of which nothing was seen, at the bottom right.

        Args:
            rows: Query blocks, at least as many as there are.
            cols: Key blocks, at least as many as there are.
        """
        pad_rows, pad_cols = rows - self.sums.shape[2], cols - self.sums.shape[3]
        if not (pad_rows or pad_cols):
            return self
        counts = self.counts.expand(-1, -1, -1, self.sums.shape[3]) if pad_cols else self.counts
        return BlockStatistics(
            grown(self.sums, rows, cols), grown(counts, rows, counts.shape[3] + pad_cols), self.kinds
        )

    def trimmed(self, block_size: tuple[int, int]) -> BlockStatistics:
        """Cut the end of self-attention in which no query was seen, because it was padding in all samples.

        Args:
            block_size: Tokens per block side, (query, key).
        """
        seen = self.counts[0].amax((0, 2)).nonzero()
        rows = int(seen.max()) + 1 if seen.numel() else 0
        cols = min(num_blocks(rows * block_size[0], block_size[1]), self.sums.shape[3])
        return BlockStatistics(self.sums[:, :, :rows, :cols], self.counts[:, :, :rows, :cols], self.kinds)

    def beside(self, own: BlockStatistics | None, kind: str) -> BlockStatistics:
        """Append the sums and counts of a score with its own, or zeros.

        Args:
            own: Sums and counts of that score alone; None: zeros.
            kind: Their name.
        """
        if own is None:
            own = BlockStatistics(torch.zeros_like(self.sums[:1]), torch.zeros_like(self.counts[:1]), (kind,))
        mine, other = self._alike(own)
        shapes = (part.counts.shape[1:] for part in (mine, other))
        shape = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, unused-ignore]
        counts = torch.cat([part.counts.expand(-1, *shape) for part in (mine, other)])
        return BlockStatistics(torch.cat((mine.sums, other.sums)), counts, (*self.kinds, kind))

    def only(self, kinds: tuple[str, ...]) -> BlockStatistics:
        """Select some of the statistics.

        Args:
            kinds: Names, in the wanted order.
        """
        if kinds == self.kinds:
            return self
        return BlockStatistics(self.sums[[self.kinds.index(kind) for kind in kinds]], self.counts, kinds)

    def of(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return a kind's sum, (num_heads, q_blocks, kv_blocks), and count, which broadcasts against it.

        Args:
            kind: One of `kinds`.
        """
        return self.sums[self.kinds.index(kind)], self.counts[_COUNTS.get(kind, -1)]


def grown(blocks: Tensor, rows: int, cols: int) -> Tensor:
    """Extend numbers per block, (..., q_blocks, kv_blocks), with zeros at the bottom right, to (..., rows, cols)."""
    return F.pad(blocks, (0, cols - blocks.shape[-1], 0, rows - blocks.shape[-2]))
