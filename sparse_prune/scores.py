"""Block scores: how much attention falls into each block, and its running average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.packing import pack, unpack
from sparse_prune.pattern import num_blocks

Statistic = Literal["mean", "mean_square", "max"]
STATISTICS: tuple[Statistic, ...] = ("mean", "mean_square", "max")


@dataclass
class BlockStatistics:
    """Sums of row-mass statistics over rows and samples; additive over batches and ranks.

    Row mass is the attention probability that one query gives to one key block; a query's masses sum to 1.
    """

    sums: Tensor
    """float64, (kinds, num_heads, q_blocks, kv_blocks): mass, squared mass, largest mass of each sample. Rows that were
    not seen have none."""
    counts: Tensor
    """float64, (2, q_blocks): query rows seen, samples seen."""
    kinds: tuple[Statistic, ...] = STATISTICS
    """What `sums` holds, in order."""

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        """Pool two probes; the shorter one fills the top-left corner."""
        rows = max(self.sums.shape[2], other.sums.shape[2])
        cols = max(self.sums.shape[3], other.sums.shape[3])
        mine, theirs, device = self.grown(rows, cols), other.grown(rows, cols), self.sums.device
        sums, counts = mine.sums + theirs.sums.to(device), mine.counts + theirs.counts.to(device)
        return BlockStatistics(sums, counts, self.kinds)

    def grown(self, rows: int, cols: int) -> BlockStatistics:
        """The same in the top-left corner of more blocks, of which nothing was seen; itself if there are no more.

        Args:
            rows: Query blocks, at least as many as there are.
            cols: Key blocks, at least as many as there are.
        """
        pad_rows, pad_cols = rows - self.sums.shape[2], cols - self.sums.shape[3]
        if not (pad_rows or pad_cols):
            return self
        sums, counts = F.pad(self.sums, (0, pad_cols, 0, pad_rows)), F.pad(self.counts, (0, pad_rows))
        return BlockStatistics(sums, counts, self.kinds)

    def trimmed(self, block_size: tuple[int, int]) -> BlockStatistics:
        """The same without the end of self-attention in which no query was seen, for it was padding in all samples.

        Args:
            block_size: Tokens per block side, (query, key).
        """
        seen = self.counts[0].nonzero()
        rows = int(seen.max()) + 1 if seen.numel() else 0
        cols = min(num_blocks(rows * block_size[0], block_size[1]), self.sums.shape[3])
        return BlockStatistics(self.sums[:, :, :rows, :cols], self.counts[:, :rows], self.kinds)

    def only(self, kinds: tuple[Statistic, ...]) -> BlockStatistics:
        """Some of the statistics.

        Args:
            kinds: Which ones, in the order in which they shall stand.
        """
        if kinds == self.kinds:
            return self
        return BlockStatistics(self.sums[[self.kinds.index(kind) for kind in kinds]], self.counts, kinds)

    def of(self, statistic: Statistic) -> tuple[Tensor, Tensor]:
        """Sum (num_heads, q_blocks, kv_blocks) and weight (q_blocks, 1) of one statistic."""
        return self.sums[self.kinds.index(statistic)], self.counts[1 if statistic == "max" else 0][:, None]


@torch.no_grad()
def probe_blocks(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
) -> BlockStatistics:
    """Row-mass statistics of dense attention, one block of queries at a time.

    Args:
        query: (batch, num_heads, q_len, head_dim), after position encoding.
        key: (batch, num_kv_heads, kv_len, head_dim).
        block_size: Tokens per block side, (query, key).
        causal: Whether query i sees only keys up to i + kv_len - q_len.
        scale: Factor on products; None means head_dim ** -0.5.
        key_mask: Boolean, (batch, kv_len), True = real. Padded positions count neither as keys nor as queries.
        attn_mask: Boolean, broadcastable to (batch, num_heads, q_len, kv_len).
        softcap: Logits become softcap * tanh(logits / softcap).

    Returns:
        NaN where a query or key is NaN or infinite.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    block_q, block_kv = block_size
    rows, cols = num_blocks(q_len, block_q), num_blocks(kv_len, block_kv)
    scale = head_dim**-0.5 if scale is None else scale
    offset = kv_len - q_len
    key_t = key.float().transpose(-1, -2)[:, :, None]  # (batch, kv_heads, 1, head_dim, kv_len)
    position = torch.arange(kv_len, device=query.device)
    sums = torch.zeros(3, heads, rows, cols, dtype=torch.float64, device=query.device)
    counts = torch.zeros(2, rows, dtype=torch.float64, device=query.device)
    for row in range(rows):
        start, stop = row * block_q, min((row + 1) * block_q, q_len)
        tile = query[:, :, start:stop].float() * scale
        # Keys behind the last query of a causal row hold no mass: leave them out of the product.
        seen = max(0, min(stop + offset, kv_len)) if causal else kv_len
        if not seen:
            continue
        grouped = tile.reshape(batch, kv_heads, heads // kv_heads, stop - start, head_dim)
        logits = (grouped @ key_t[..., :seen]).float().flatten(1, 2)  # (batch, num_heads, rows, seen)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        mask = torch.ones(1, 1, stop - start, seen, dtype=torch.bool, device=query.device)
        if causal:
            mask = mask & (position[:seen] <= position[:, None][start + offset : stop + offset])
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, :seen]
            if q_len == kv_len:
                mask = mask & key_mask[:, None, start:stop, None]
        if attn_mask is not None:
            mask = mask & attn_mask.expand(-1, -1, q_len, kv_len)[:, :, start:stop, :seen]
        weights = torch.softmax(logits.masked_fill(~mask, torch.finfo(torch.float32).min), -1) * mask
        width = num_blocks(seen, block_kv)
        padded = F.pad(weights, (0, width * block_kv - seen))
        # (batch, num_heads, rows, width); every size is given, for a batch may be empty
        mass = padded.view(batch, heads, stop - start, width, block_kv).sum(-1).double()
        valid = mask.any(-1).any(1).expand(batch, -1)  # (batch, rows)
        sums[0, :, row, :width] = mass.sum((0, 2))
        sums[1, :, row, :width] = mass.square().sum((0, 2))
        sums[2, :, row, :width] = mass.amax(2).sum(0)
        counts[0, row], counts[1, row] = valid.sum(), valid.any(-1).sum()
    return BlockStatistics(sums, counts)


class ScoreAverage:
    """Exponential moving average of a statistic: decayed sums over decayed weights.

    The ratio needs no bias correction. Blocks that a shorter batch does not reach keep what they had; blocks
    never seen score infinity, so that nothing unknown is pruned.

    Raises:
        ValueError: If `decay` is outside [0, 1).
    """

    def __init__(self, statistic: Statistic, decay: float) -> None:
        if statistic not in STATISTICS:
            raise ValueError(f"`statistic` must be one of {STATISTICS}, got {statistic!r}.")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        self.statistic, self.decay = statistic, decay
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    def update(self, statistics: BlockStatistics) -> None:
        """Take the probe of one optimizer step."""
        total, weight = statistics.of(self.statistic)
        if self._sum is None or self._weight is None:
            self._sum, self._weight = total.clone(), weight.expand(total.shape[1:]).clone()
            return
        rows, cols = (max(self._sum.shape[i], total.shape[i]) for i in (1, 2))
        if (rows, cols) != self._sum.shape[1:]:
            grow = (0, cols - self._sum.shape[2], 0, rows - self._sum.shape[1])
            self._sum, self._weight = F.pad(self._sum, grow), F.pad(self._weight, grow)
        corner = (slice(total.shape[1]), slice(total.shape[2]))
        # Rows that were not seen keep what they had: they have nothing to add, either.
        fade = torch.full_like(weight, self.decay).masked_fill_(weight <= 0, 1.0)
        self._weight[corner].mul_(fade).add_(weight)
        self._sum[(slice(None), *corner)].mul_(fade).add_(total)

    @property
    def empty(self) -> bool:
        """Whether nothing was probed yet."""
        return self._sum is None

    @property
    def shape(self) -> torch.Size:
        """Of the scores, (num_heads, q_blocks, kv_blocks).

        Raises:
            RuntimeError: If nothing was probed yet.
        """
        return self._known()[0].shape

    def value(self) -> Tensor:
        """Scores, float32, (num_heads, q_blocks, kv_blocks).

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
        """What to save: the sums, packed, and the weights, (q_blocks, kv_blocks). Later updates do not change it."""
        return {"sum": pack(self._sum), "weight": None if self._weight is None else self._weight.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        total, weight = unpack(state["sum"]), state["weight"]
        self._sum = None if total is None else total.clone()
        self._weight = None if weight is None else weight.clone()
