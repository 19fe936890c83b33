"""Keys and values of a cache that evicts, in which every KV head holds its own blocks, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels import AttentionOptions, reference
from sparse_prune.pattern import BlockPattern


@dataclass(eq=False)
class Bucket:
    """Keys and values of the KV heads that hold equally many blocks.

    Held blocks stand side by side, in order. All are full but the one that the latest token is in.
    """

    heads: Tensor
    """KV heads, ascending, int64, (heads,), on the CPU."""
    blocks: Tensor
    """Key blocks that each of them holds, ascending, int64, (heads, blocks), on the CPU."""
    keys: Tensor
    """(batch, heads, blocks * block, head_dim)."""
    values: Tensor
    """(batch, heads, blocks * block, value_dim)."""
    _row: int = -1
    _row_mask: Tensor | None = None
    _index: Tensor | slice | None = None
    _positions: Tensor | None = None

    def index(self, num_kv_heads: int) -> Tensor | slice:
        """What picks the bucket's heads out of all on their device, where it stays: a copy per token would wait."""
        if self._index is None:
            everyone = len(self.heads) == num_kv_heads
            self._index = slice(None) if everyone else self.heads.to(self.keys.device)
        return self._index

    def positions(self, block: int) -> Tensor:
        """Position in the sequence of every slot, (heads, slots), on the keys' device, where it stays.

        Args:
            block: Tokens per key block.
        """
        if self._positions is None:
            slots = self.blocks[:, :, None] * block + torch.arange(block)
            self._positions = slots.flatten(1).to(self.keys.device)
        return self._positions

    def row_mask(self, row: int, pattern: BlockPattern, num_kv_heads: int) -> Tensor | None:
        """Slots that the queries of one pattern row attend to, (heads, group, 1, slots); None: all of them.

        Kept until another row is asked for, as decoding stays in a row for many tokens.
        """
        if row != self._row:
            keep = self.block_mask(row, row + 1, pattern, num_kv_heads)
            slots = keep.repeat_interleave(pattern.block_size[1], -1).to(self.keys.device)
            self._row, self._row_mask = row, None if bool(keep.all()) else slots
        return self._row_mask

    def block_mask(self, first_row: int, end_row: int, pattern: BlockPattern, num_kv_heads: int) -> Tensor:
        """Held blocks that rows of the pattern attend to, (heads, group, rows, blocks), on the CPU."""
        cols = int(self.blocks.max()) + 1 if self.blocks.numel() else 0
        keep = torch.unflatten(pattern.keep_rows(first_row, end_row, cols), 0, (num_kv_heads, -1))[self.heads]
        return keep.take_along_dim(self.blocks[:, None, None, :], -1)


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """All keys and values that a layer's cache holds, those of the latest queries included.

    The model's code gets it from its cache in place of both tensors and passes it on. It is no tensor: whatever
    computes with it, other than attention that was taken over, fails instead of taking some keys for all.
    """

    buckets: tuple[Bucket, ...]
    """Every KV head is in one of them."""
    shape: tuple[int, int, int, int]
    """(batch, num_kv_heads, length, head_dim), as if nothing had been evicted."""
    pattern: BlockPattern
    """The pattern that the cache evicted by."""
    first: tuple[Tensor, Tensor] | None = None
    """The first tokens' keys and values, whose queries attend to all of them: (batch, num_kv_heads, length, head_dim)
    each. None: there were tokens before, and `attend` knows what is held of them."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_misused(name))

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(_misused("indexing"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(_misused(func.__name__))

    def attend(self, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attention of the last queries.

        Args:
            query: (batch, num_heads, q_len, head_dim), the last `q_len` of the sequence's positions.
            options: Masks over all keys of the sequence, scale, soft cap. Dropout is not applied.

        Returns:
            (batch, num_heads, q_len, value_dim). Rows that may attend to nothing are zero.
        """
        q_len = query.shape[2]
        num_kv_heads = self.shape[1]
        grouped = torch.unflatten(query, 1, (num_kv_heads, -1))  # (batch, kv_heads, group, q_len, head_dim)
        output: Tensor | None = None
        for bucket in self.buckets:
            used = self._used(bucket)
            index = bucket.index(num_kv_heads)
            mask = self._mask(bucket, q_len, used, options)
            if mask is not None:
                mask = mask.expand(-1, -1, grouped.shape[2], q_len, -1).flatten(2, 3)
            # The group's queries become rows of one head, so that keys are not repeated.
            rows = grouped[:, index].flatten(2, 3)
            found = masked_attention(rows, bucket.keys[:, :, :used], bucket.values[:, :, :used], mask, options)
            if output is None:  # autocast may give another type than the query's
                output = found.new_empty(*grouped.shape[:-1], found.shape[-1])
            output[:, index] = torch.unflatten(found, 2, (-1, q_len))
        assert output is not None
        return output.flatten(1, 2)

    def _used(self, bucket: Bucket) -> int:
        return bucket.keys.shape[2] - -self.shape[2] % self.pattern.block_size[1]

    def _mask(self, bucket: Bucket, q_len: int, used: int, options: AttentionOptions) -> Tensor | None:
        """Which slots each query attends to, (batch or 1, heads, group or 1, q_len or 1, used); None: all."""
        block_q, block_kv = self.pattern.block_size
        _, num_kv_heads, length, _ = self.shape
        start, device = length - q_len, bucket.keys.device
        if q_len == 1:
            mask = bucket.row_mask(start // block_q, self.pattern, num_kv_heads)
            mask = None if mask is None else mask[None, ..., :used]
        else:
            query = torch.arange(start, length)
            first, end = start // block_q, (length - 1) // block_q + 1
            keep = bucket.block_mask(first, end, self.pattern, num_kv_heads)[:, :, query // block_q - first]
            keep = keep.to(device).repeat_interleave(block_kv, -1)[..., :used]
            position = bucket.positions(block_kv)[:, None, None, :used]
            mask = (keep & (position <= query[:, None].to(device)))[None]
        if options.key_mask is not None or options.attn_mask is not None:
            position = bucket.positions(block_kv)[None, :, None, None, :used]
            if options.key_mask is not None:
                mask = _both(mask, options.key_mask[:, None, None, None, :].take_along_dim(position, -1))
            if options.attn_mask is not None:
                given = options.attn_mask[:, None]  # (batch, 1, 1, q_len, length), or with all heads in the third place
                if given.shape[2] > 1:
                    given = torch.unflatten(options.attn_mask, 1, (num_kv_heads, -1))[:, bucket.index(num_kv_heads)]
                mask = _both(mask, given.take_along_dim(position, -1))
        return mask


def _misused(operation: str) -> str:
    return (
        f"What `PatternCache` holds must go as it is to attention that was taken over, got `{operation}` of it. "
        "If the model was detached, call `sparse_prune.attention.attach(model)`; else its code changes keys or values "
        "behind the cache: use a cache that evicts nothing, such as DynamicCache()."
    )


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention of few rows under a boolean mask, with a soft cap if asked for.

    Args:
        query: (batch, heads, q_len, head_dim).
        key: (batch, heads, kv_len, head_dim).
        value: (batch, heads, kv_len, value_dim).
        mask: Broadcastable to (batch, heads, q_len, kv_len), True = may attend. None: all may.
        options: Scale and soft cap; its masks are not read.

    Returns:
        (batch, heads, q_len, value_dim). Rows that may attend to nothing are zero.
    """
    if options.softcap is not None:
        everything = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
        capped = AttentionOptions(scale=options.scale, softcap=options.softcap)
        return reference.masked_attention(query, key, value, everything if mask is None else mask, capped)
    output: Tensor = F.scaled_dot_product_attention(query, key, value, mask, scale=options.scale)
    return output if mask is None else output.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other
