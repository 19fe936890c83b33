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
    """float64, (2, q_blocks): query rows seen, samples seen. A score with sums of its own has a row of its own, the
    last or the only one. For packed sequences (2, q_blocks, kv_blocks): those whose document reaches into the block."""
    kinds: tuple[str, ...] = STATISTICS
    """Names of the parts of `sums`, in order."""

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        """Add two probes; the shorter one fills the top-left corner."""
        mine, theirs = self._alike(other)
        sums, counts = (a + b.to(a.device) for a, b in ((mine.sums, theirs.sums), (mine.counts, theirs.counts)))
        return BlockStatistics(sums, counts, self.kinds)

    def _alike(self, other: BlockStatistics) -> tuple[BlockStatistics, BlockStatistics]:
        """Both with equally many blocks, and counts of the same shape."""
        rows, cols = (max(self.sums.shape[i], other.sums.shape[i]) for i in (2, 3))
        both = self.grown(rows, cols), other.grown(rows, cols)
        if self.counts.dim() != other.counts.dim():
            return both[0].of_blocks(), both[1].of_blocks()
        return both

    def of_blocks(self) -> BlockStatistics:
        """Return the same with counts per block."""
        if self.counts.dim() == 3:
            return self
        counts = self.counts[:, :, None].expand(-1, -1, self.sums.shape[3])
        return BlockStatistics(self.sums, counts, self.kinds)

    def grown(self, rows: int, cols: int) -> BlockStatistics:
        """Extend to more blocks, of which nothing was seen, at the bottom right.

        Args:
            rows: Query blocks, at least as many as there are.
            cols: Key blocks, at least as many as there are.
        """
        pad_rows, pad_cols = rows - self.sums.shape[2], cols - self.sums.shape[3]
        if not (pad_rows or pad_cols):
            return self
        sums, counts = F.pad(self.sums, (0, pad_cols, 0, pad_rows)), self.counts
        counts = F.pad(counts, (0, pad_rows) if counts.dim() == 2 else (0, pad_cols, 0, pad_rows))
        return BlockStatistics(sums, counts, self.kinds)

    def trimmed(self, block_size: tuple[int, int]) -> BlockStatistics:
        """Cut the end of self-attention in which no query was seen, because it was padding in all samples.

        Args:
            block_size: Tokens per block side, (query, key).
        """
        seen = self.counts[0].nonzero()[:, 0]
        rows = int(seen.max()) + 1 if seen.numel() else 0
        cols = min(num_blocks(rows * block_size[0], block_size[1]), self.sums.shape[3])
        counts = self.counts[:, :rows] if self.counts.dim() == 2 else self.counts[:, :rows, :cols]
        return BlockStatistics(self.sums[:, :, :rows, :cols], counts, self.kinds)

    def beside(self, own: BlockStatistics | None, kind: str) -> BlockStatistics:
        """Append the sums and counts of a score with its own, or zeros.

        Args:
            own: Sums and counts of that score alone; None: zeros.
            kind: Their name.
        """
        if own is None:
            own = BlockStatistics(torch.zeros_like(self.sums[:1]), torch.zeros_like(self.counts[:1]), (kind,))
        mine, other = self._alike(own)
        sums, counts = torch.cat((mine.sums, other.sums)), torch.cat((mine.counts, other.counts))
        return BlockStatistics(sums, counts, (*self.kinds, kind))

    def only(self, kinds: tuple[str, ...]) -> BlockStatistics:
        """Select some of the statistics.

        Args:
            kinds: Names, in the wanted order.
        """
        if kinds == self.kinds:
            return self
        return BlockStatistics(self.sums[[self.kinds.index(kind) for kind in kinds]], self.counts, kinds)

    def of(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return a kind's sum, (num_heads, q_blocks, kv_blocks), and count, (q_blocks, 1) or (q_blocks, kv_blocks).

        Args:
            kind: One of `kinds`.
        """
        weight = self.counts[_COUNTS.get(kind, -1)]
        return self.sums[self.kinds.index(kind)], weight[:, None] if weight.dim() == 1 else weight
