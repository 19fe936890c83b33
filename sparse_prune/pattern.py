"""Block patterns: which query block may attend to which key block, per head."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor


def num_blocks(length: int, block: int) -> int:
    """Return the number of blocks that cover `length` tokens; the last one may be ragged."""
    return -(-length // block)


def whole_number(value: object) -> int | None:
    """Convert a whole number of any type, NumPy's included, to int; None for anything else, booleans included."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def check_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Normalise a block size to (query tokens, key tokens).

    Raises:
        ValueError: If a side is not positive, or if neither side divides the other.
    """
    given = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    sides = [whole_number(side) or 0 for side in given]
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"`block_size` must be a positive int or two of them, got {block_size!r}. Write 64, say.")
    if max(sides) % min(sides):
        raise ValueError(
            f"One side of `block_size` must divide the other, got {tuple(sides)}. "
            f"Use ({min(sides)}, {min(sides)}) or a multiple such as ({2 * min(sides)}, {min(sides)})."
        )
    return sides[0], sides[1]


def suited_block_size(length: int) -> tuple[int, int]:
    """Choose the block size for a length: 64 tokens per side, or 32 or 16 if that gives fewer than 32 blocks.

    With `n` blocks per side, `2n - 1` of `n (n + 1) / 2` possible ones hold a sink or the diagonal and stay
    (docs/choosing.md).

    Args:
        length: Tokens of a sequence.
    """
    side = next((side for side in (64, 32) if length >= 32 * side), 16)
    return side, side


def possible_blocks(
    q_len: int, kv_len: int, block_size: tuple[int, int], causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Mark the blocks in which at least one query may see at least one key.

    Causal masks are aligned at the bottom right: query i sees keys up to i + kv_len - q_len.

    Returns:
        Boolean, (q_blocks, kv_blocks).
    """
    block_q, block_kv = block_size
    rows, cols = num_blocks(q_len, block_q), num_blocks(kv_len, block_kv)
    if not causal:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    row, col = torch.arange(rows, device=device), torch.arange(cols, device=device)
    last_query = torch.clamp((row + 1) * block_q, max=q_len) - 1 + kv_len - q_len
    return last_query[:, None] >= col * block_kv


def whole_blocks(
    q_len: int, kv_len: int, block_size: tuple[int, int], causal: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """Mark the blocks in which every query may see every key, and all keys are real: (q_blocks, kv_blocks), boolean."""
    block_q, block_kv = block_size
    row = torch.arange(num_blocks(q_len, block_q), device=device)[:, None]
    last_key = (torch.arange(num_blocks(kv_len, block_kv), device=device) + 1) * block_kv - 1
    whole = (last_key < kv_len).expand(len(row), -1)
    return whole & (last_key <= row * block_q + kv_len - q_len) if causal else whole


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """The connections that one attention layer keeps.

    Patterns are immutable: pruning makes a new one, and nothing writes into `keep`, so that derived values are computed
    once. They live on the CPU; kernels build their index tables from them once and cache those per device.

    Raises:
        TypeError: If `keep` is not a boolean tensor.
        ValueError: If the shape of `keep` does not follow from the lengths and the block size.
    """

    keep: Tensor
    """Boolean, (num_heads, q_blocks, kv_blocks), True = kept. Blocks hidden by causality are cleared."""
    block_size: tuple[int, int]
    """Tokens per block side, (query, key)."""
    causal: bool
    """Whether query i sees only keys up to i + kv_len - q_len."""
    q_len: int
    """Query tokens that the pattern covers."""
    kv_len: int
    """Key tokens that the pattern covers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        if not isinstance(self.keep, Tensor) or self.keep.dtype != torch.bool:
            kind = self.keep.dtype if isinstance(self.keep, Tensor) else type(self.keep).__name__
            raise TypeError(f"`keep` must be a boolean tensor, got {kind}. Compare scores with a threshold first.")
        possible = possible_blocks(self.q_len, self.kv_len, self.block_size, self.causal)
        if self.keep.dim() != 3 or self.keep.shape[1:] != possible.shape:
            raise ValueError(
                f"`keep` must have shape (num_heads, {possible.shape[0]}, {possible.shape[1]}) for lengths "
                f"({self.q_len}, {self.kv_len}) and blocks {self.block_size}, got {tuple(self.keep.shape)}. "
                "Give the lengths that it was made for."
            )
        object.__setattr__(self, "keep", self.keep.detach().cpu() & possible)

    @classmethod
    def dense(
        cls, num_heads: int, q_len: int, kv_len: int, block_size: int | tuple[int, int], causal: bool
    ) -> BlockPattern:
        """Make the pattern that keeps everything.

        Args:
            num_heads: Query heads.
            q_len: Query tokens.
            kv_len: Key tokens.
            block_size: Tokens per block side, or (query, key).
            causal: Whether query i sees only keys up to i + kv_len - q_len.
        """
        sides = check_block_size(block_size)
        possible = possible_blocks(q_len, kv_len, sides, causal)
        return cls(possible.expand(num_heads, -1, -1).clone(), sides, causal, q_len, kv_len)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.keep.shape[0]

    @cached_property
    def possible(self) -> Tensor:
        """Blocks that are not hidden by causality, boolean, (q_blocks, kv_blocks)."""
        return possible_blocks(self.q_len, self.kv_len, self.block_size, self.causal)

    @cached_property
    def head_sparsity(self) -> Tensor:
        """Share of the possible blocks that is pruned, (num_heads,), in [0, 1]."""
        return 1.0 - self.keep.sum((1, 2)) / self.possible.sum()

    @property
    def sparsity(self) -> float:
        """Share of the possible blocks that is pruned, over all heads, in [0, 1]."""
        return 1.0 - self.kept_blocks / self.possible_count

    @cached_property
    def kept_blocks(self) -> int:
        """Kept blocks over all heads."""
        return int(self.keep.count_nonzero())

    @cached_property
    def possible_count(self) -> int:
        """Possible blocks over all heads."""
        return int(self.possible.sum()) * self.num_heads

    def equals(self, other: BlockPattern) -> bool:
        """Whether both have the same blocks and lengths and keep the same connections."""
        if self is other:
            return True
        ours, theirs = ((p.block_size, p.causal, p.q_len, p.kv_len) for p in (self, other))
        return ours == theirs and torch.equal(self.keep, other.keep)

    def difference(self, other: BlockPattern) -> float:
        """Return the Jaccard distance, in [0, 1]: of the blocks that either keeps, the share that only one keeps.

        Patterns of different lengths are compared where both are defined: in the top-left corner.
        """
        rows = min(self.keep.shape[1], other.keep.shape[1])
        cols = min(self.keep.shape[2], other.keep.shape[2])
        mine, theirs = self.keep[:, :rows, :cols], other.keep[:, :rows, :cols]
        union = int((mine | theirs).count_nonzero())
        return int((mine ^ theirs).count_nonzero()) / union if union else 0.0

    def at(self, q_len: int, kv_len: int) -> BlockPattern:
        """Return the pattern for other lengths.

        - Shorter inputs take the top-left corner.
        - Longer inputs keep what was learned, and every new row follows the last learned row of its head:
          its sinks (the leading run of kept columns) stay where they are, its other kept blocks stay at
          their distance from the diagonal. A head whose last row is dense stays dense. Bidirectional
          patterns take the distances from their middle row, which looks both ways.
        - With fewer queries than keys (a chunk of a longer sequence) the queries are the last ones.

        Args:
            q_len: Query tokens.
            kv_len: Key tokens.

        Raises:
            ValueError: If there are more queries than keys in a causal pattern, or if the queries do not
                start at a block border.
        """
        if (q_len, kv_len) == (self.q_len, self.kv_len):
            return self
        block_q, block_kv = self.block_size
        offset = kv_len - q_len if self.causal else 0
        if offset < 0 or offset % block_q:
            raise ValueError(
                f"In a causal pattern `kv_len - q_len` must be a multiple of the query block ({block_q}) and not "
                f"negative, got {kv_len} - {q_len}. Use `token_mask` for single queries."
            )
        keep = self.keep_rows(offset // block_q, num_blocks(q_len + offset, block_q), num_blocks(kv_len, block_kv))
        return BlockPattern(keep, self.block_size, self.causal, q_len, kv_len)

    @cached_property
    def _rule(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The rule for longer sequences: sinks, band and density of each head, and the band's diagonal column."""
        block_q, block_kv = self.block_size
        rows, cols = self.keep.shape[1:]
        source = rows - 1 if self.causal else rows // 2
        last, template = self.keep[:, -1], self.keep[:, source]  # (num_heads, kv_blocks)
        dense = (last | ~self.possible[-1]).all(-1)
        sinks = last.long().cumprod(-1).sum(-1)
        band = template & (torch.arange(cols) >= sinks[:, None])
        return sinks, band, dense, (min((source + 1) * block_q, self.q_len) - 1) // block_kv

    def _diagonal(self, row: Tensor) -> Tensor:
        """Return the key block of a row's last query, as if the row were whole."""
        return ((row + 1) * self.block_size[0] - 1) // self.block_size[1]

    def keep_rows(self, first: int, end: int, cols: int) -> Tensor:
        """Return the keep mask of some rows of blocks, by the rule of `at` where they were not learned.

        Args:
            first: First row of blocks, counted from the sequence's start.
            end: Row after the last one.
            cols: Key blocks.

        Returns:
            Boolean, (num_heads, end - first, cols). Blocks past a row's diagonal have no meaning.
        """
        old_rows, old_cols = self.keep.shape[1:]
        if end <= old_rows and cols <= old_cols:
            return self.keep[:, first:end, :cols]
        sinks, band, dense, origin = self._rule
        col = torch.arange(cols)
        from_col = origin + col[None, :] - self._diagonal(torch.arange(first, end))[:, None]  # (rows, cols)
        inside = (from_col >= 0) & (from_col < old_cols)
        keep = band[:, from_col.clamp(0, old_cols - 1)] & inside
        keep |= (col < sinks[:, None])[:, None, :]
        keep |= dense[:, None, None]
        if first < old_rows:
            learned = self.keep[:, first:end, :cols]
            keep[:, : learned.shape[1], : learned.shape[2]] = learned
        return keep

    def needed_after(self, length: int) -> Tensor:
        """Mark the key blocks of the first `length` tokens that a later query may attend to, however long the sequence.

        The rule of `at` applies past the learned length: sinks and dense heads are needed for ever, any other
        block until the band has moved past it. A KV cache may evict all other blocks.

        Args:
            length: Tokens so far; later queries have this position or a later one.

        Returns:
            Boolean, (num_heads, kv_blocks of `length`).

        Raises:
            ValueError: If the pattern is not causal or not of self-attention.
        """
        if not self.causal or self.q_len != self.kv_len:
            raise ValueError(
                "`needed_after` needs a causal pattern of self-attention, got "
                f"causal={self.causal}, q_len={self.q_len}, kv_len={self.kv_len}. Use a cache that evicts nothing."
            )
        block_q, block_kv = self.block_size
        old_rows, old_cols = self.keep.shape[1:]
        row, col = length // block_q, torch.arange(num_blocks(length, block_kv))
        sinks, band, dense, origin = self._rule
        # Later rows see a block ever further to the left of the band, one diagonal step at a time.
        step = max(block_q // block_kv, 1)
        reached = band.clone()
        for c in range(step, old_cols):
            reached[:, c] |= reached[:, c - step]

        def by_rule(first_row: int) -> Tensor:
            from_col = origin + col - int(self._diagonal(torch.tensor(first_row)))
            # Past the band's right end, a block will enter it from there, in step with the rows.
            over = torch.clamp(from_col - (old_cols - 1), min=0)
            from_col = from_col - -(-over // step) * step
            return reached[:, from_col.clamp(0, old_cols - 1)] & (from_col >= 0)

        needed = by_rule(max(row, old_rows))
        if row < old_rows:
            needed[:, old_cols:] |= by_rule(row)[:, old_cols:]
            learned = self.keep[:, row:, : len(col)].any(1)
            needed[:, : learned.shape[1]] |= learned
        return needed | (col < sinks[:, None]) | dense[:, None]

    def droppable_share(self, num_kv_heads: int) -> float:
        """Return the share of the KV cache that no query after the pattern's last one may attend to, in [0, 1].

        A KV head's block is needed as long as any of its query heads may attend to it, however far in the future.

        Args:
            num_kv_heads: Key and value heads, each shared by equally many query heads.
        """
        needed = self.needed_after(self.kv_len).view(num_kv_heads, -1, self.keep.shape[2]).any(1)
        return 1.0 - float(needed.float().mean())

    def flops(self, head_dim: int, value_dim: int | None = None) -> tuple[int, int]:
        """Count the FLOPs (two per multiply-add) of one sample's forward pass, in kept blocks and in all possible ones.

        Args:
            head_dim: Channels of a head's queries and keys.
            value_dim: Channels of a head's values; None: `head_dim`.
        """
        per_block = 2 * math.prod(self.block_size) * (head_dim + (head_dim if value_dim is None else value_dim))
        return self.kept_blocks * per_block, self.possible_count * per_block

    def token_mask(self, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the element mask of queries that are the last `q_len` of `kv_len` positions (or all of them).

        Args:
            q_len: Query tokens.
            kv_len: Key tokens.
            device: Device of the mask.

        Returns:
            Boolean, (num_heads, q_len, kv_len), True = may attend.
        """
        block_q, block_kv = self.block_size
        offset = kv_len - q_len if self.causal else 0
        own = (q_len, kv_len) == (self.q_len, self.kv_len)
        start = 0 if own else offset  # position of the first query among the rows of the pattern
        first, end = start // block_q, num_blocks(start + q_len, block_q)
        keep = (self.keep if own else self.keep_rows(first, end, num_blocks(kv_len, block_kv))).to(device)
        query, key = torch.arange(q_len, device=device), torch.arange(kv_len, device=device)
        mask = keep[:, (query + start) // block_q - first][:, :, key // block_kv]
        return mask & (key <= query[:, None] + offset) if self.causal else mask


def total_sparsity(patterns: Collection[BlockPattern]) -> float:
    """Return the share of possible blocks that is pruned, over all heads of the patterns, in [0, 1]; 0 without any."""
    possible = sum(pattern.possible_count for pattern in patterns)
    return 1.0 - sum(pattern.kept_blocks for pattern in patterns) / possible if possible else 0.0
