"""An attention call as scores see it: one block of queries at a time, to hold no (q_len, kv_len) of all heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.pattern import BlockPattern, num_blocks

Per = Literal["row", "sample", "call"]


def mask_heads(attn_mask: Tensor | None) -> int:
    """Return how many heads a mask, broadcastable to (batch, num_heads, q_len, kv_len), tells apart: all, or 1."""
    return 1 if attn_mask is None or attn_mask.dim() < 3 else attn_mask.shape[-3]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The inputs of a layer's call. A score iterates over its `tiles`.

    Raises:
        ValueError: If `pattern` has other blocks or other lengths than the call.
    """

    query: Tensor
    """(batch, num_heads, q_len, head_dim), after position encoding."""
    key: Tensor
    """(batch, num_kv_heads, kv_len, head_dim)."""
    block_size: tuple[int, int]
    """Tokens per block side, (query, key)."""
    causal: bool
    """Whether query i sees only keys up to i + kv_len - q_len."""
    value: Tensor | None = None
    """(batch, num_kv_heads, kv_len, head_dim); None if the score sees queries and keys alone."""
    gradient: Tensor | None = None
    """Gradient of the loss in the output, (batch, num_heads, q_len, head_dim); None if the score does not see it."""
    scale: float | None = None
    """Factor on products; None means head_dim ** -0.5."""
    key_mask: Tensor | None = None
    """Boolean, (batch, kv_len), True = real. Padded positions count neither as keys nor as queries."""
    attn_mask: Tensor | None = None
    """Boolean, broadcastable to (batch, num_heads, q_len, kv_len)."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    pattern: BlockPattern | None = None
    """The connections that the layer kept in this call; None: all of them."""

    def __post_init__(self) -> None:
        if self.pattern is None:
            return
        mine = (self.block_size, self.query.shape[2], self.key.shape[2])
        theirs = (self.pattern.block_size, self.pattern.q_len, self.pattern.kv_len)
        if mine != theirs:
            raise ValueError(
                f"`pattern` must have the block size and lengths of the call, {mine}, got {theirs}. "
                "Probe with the pattern's block size, and pass `pattern.at(q_len, kv_len)`."
            )

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return num_blocks(self.query.shape[2], self.block_size[0])

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys."""
        return num_blocks(self.key.shape[2], self.block_size[1])

    def tiles(self) -> Iterator[Tile]:
        """Iterate over the blocks of queries that may see a key, from the first to the last."""
        q_len, kv_len = self.query.shape[2], self.key.shape[2]
        for row in range(self.q_blocks):
            start, stop = row * self.block_size[0], min((row + 1) * self.block_size[0], q_len)
            # Keys after the last query of a causal row hold no mass: leave them out of the product.
            seen = max(0, min(stop + kv_len - q_len, kv_len)) if self.causal else kv_len
            if seen:
                yield Tile(self, row, start, stop, seen)

    @cached_property
    def _keys(self) -> Tensor:
        return self.key.float().transpose(-1, -2)[:, :, None]  # (batch, num_kv_heads, 1, head_dim, kv_len)

    @cached_property
    def _values(self) -> Tensor:
        if self.value is None:
            raise ValueError(
                'A score that uses values must say so, got `sees = "keys"`. Write `sees = "values"` in its class.'
            )
        return self.value.float()

    @cached_property
    def _gradient(self) -> Tensor:
        if self.gradient is None:
            raise ValueError(
                "A score that uses the gradient must say so, got one that sees the forward pass alone. "
                'Write `sees = "gradient"` in its class.'
            )
        return self.gradient.float()

    @cached_property
    def _keep(self) -> Tensor | None:
        return None if self.pattern is None else self.pattern.keep.to(self.query.device)


@dataclass(frozen=True, eq=False)
class Tile:
    """One block of queries and the keys that it may see. Tensors are float32 unless they say otherwise."""

    call: AttentionCall
    """The call that it is part of."""
    row: int
    """Number of the block of queries."""
    start: int
    """First query."""
    stop: int
    """The query after the last one."""
    seen: int
    """Number of keys up to the last one that it may see."""

    @property
    def kv_blocks(self) -> int:
        """Number of blocks of these keys."""
        return num_blocks(self.seen, self.call.block_size[1])

    @cached_property
    def mask(self) -> Tensor:
        """Keys that each query may attend to: boolean, broadcastable to (batch, num_heads, rows, seen)."""
        call, start, stop, seen = self.call, self.start, self.stop, self.seen
        q_len, kv_len = call.query.shape[2], call.key.shape[2]
        mask = torch.ones(1, 1, stop - start, seen, dtype=torch.bool, device=call.query.device)
        if call.causal:
            position = torch.arange(kv_len, device=call.query.device)
            mask = mask & (position[:seen] <= position[:, None][start + kv_len - q_len : stop + kv_len - q_len])
        if call.key_mask is not None:
            mask = mask & call.key_mask[:, None, None, :seen]
            if q_len == kv_len:
                mask = mask & call.key_mask[:, None, start:stop, None]
        if call.attn_mask is not None:
            mask = mask & call.attn_mask.expand(-1, -1, q_len, kv_len)[:, :, start:stop, :seen]
        return mask

    @cached_property
    def valid(self) -> Tensor:
        """Queries that are real and may see a key: boolean, (batch, num_heads, rows), or 1 for all heads."""
        return self.mask.any(-1).expand(len(self.call.query), -1, -1)

    @cached_property
    def logits(self) -> Tensor:
        """(batch, num_heads, rows, seen); the lowest float32 number where a query may not attend."""
        call = self.call
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        logits = self._products(call.query[:, :, self.start : self.stop].float() * scale, call._keys)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        return logits.masked_fill(~self.mask, torch.finfo(torch.float32).min)

    @cached_property
    def weights(self) -> Tensor:
        """Attention probability over all keys that a query may see, pruned ones included, shaped as `logits`."""
        return torch.softmax(self.logits, -1) * self.mask

    @cached_property
    def mass(self) -> Tensor:
        """Row mass, the probability that a query gives to a block: float64, (batch, num_heads, rows, kv_blocks)."""
        return self.per_block(self.weights).double()

    @cached_property
    def values(self) -> Tensor:
        """(batch, num_kv_heads, seen, head_dim)."""
        return self.call._values[:, :, : self.seen]

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the loss in the output, (batch, num_heads, rows, head_dim)."""
        return self.call._gradient[:, :, self.start : self.stop]

    @cached_property
    def gradient_by_key(self) -> Tensor:
        """Gradient of the loss in the attention probabilities, shaped as `logits`."""
        return self._products(self.gradient, self.values.transpose(-1, -2)[:, :, None])

    @cached_property
    def kept(self) -> Tensor:
        """Blocks that the layer kept in this call: boolean, (num_heads, kv_blocks of the tile)."""
        if self.call._keep is None:
            heads, device = self.call.query.shape[1], self.call.query.device
            return torch.ones(heads, self.kv_blocks, dtype=torch.bool, device=device)
        return self.call._keep[:, self.row, : self.kv_blocks]

    def count(self, unit: Per) -> Tensor:
        """Count the query rows, samples or calls (1) that may see a key, (num_heads,), or (1,) if heads are alike."""
        if unit == "row":
            return self.valid.sum((0, 2))
        samples = self.valid.any(-1)
        return samples.sum(0) if unit == "sample" else samples.any(0)

    def per_block(self, numbers: Tensor) -> Tensor:
        """Sum over the keys of each block.

        Args:
            numbers: (batch, num_heads, rows, seen).

        Returns:
            (batch, num_heads, rows, kv_blocks of the tile).
        """
        width, side = self.kv_blocks, self.call.block_size[1]
        padded = F.pad(numbers, (0, width * side - self.seen))
        # Every size is given, because a batch may be empty.
        return padded.view(*numbers.shape[:3], width, side).sum(-1)

    def per_key(self, blocks: Tensor) -> Tensor:
        """Repeat the number of each block for all its keys.

        Args:
            blocks: (..., kv_blocks of the tile).

        Returns:
            (..., seen).
        """
        return blocks.repeat_interleave(self.call.block_size[1], -1)[..., : self.seen]

    def _products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Multiply (batch, num_heads, rows, head_dim) by what is seen of (batch, num_kv_heads, 1, head_dim, kv_len)."""
        batch, heads, count, head_dim = rows.shape
        kv_heads = columns.shape[1]
        grouped = rows.reshape(batch, kv_heads, heads // kv_heads, count, head_dim)
        return (grouped @ columns[..., : self.seen]).float().flatten(1, 2)
