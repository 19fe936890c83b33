"""Keys and values of a cache that evicts, in which every KV head holds its own blocks, and attention over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sparse_prune.attention.chunks import attend_chunk, spans_rows
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.backend import Decode, HeldBlocks
from sparse_prune.kernels.backends.sdpa import masked_attention
from sparse_prune.pattern import BlockPattern, num_blocks


@dataclass(eq=False)
class HeadSet:
    """KV heads that hold equally many blocks.

    Held blocks stand side by side, in order. All are full but the one that the latest token is in.
    """

    heads: Tensor
    """KV heads, ascending, int64, (heads,), on the CPU."""
    num_kv_heads: int
    """KV heads of all sets."""
    blocks: Tensor
    """Key blocks that each of them holds, ascending, int64, (heads, blocks), on the CPU."""
    block: int
    """Tokens per key block."""
    first: int
    """Number of its first slot."""
    device: torch.device
    """Device of keys and values."""
    _row: int = -1
    _row_mask: Tensor | None = None

    @property
    def slots(self) -> int:
        """Number of slots of each head."""
        return self.blocks.shape[1] * self.block

    def of(self, everything: Tensor) -> Tensor:
        """View the set's part of keys or values, (batch, all slots, dim), as (batch, heads, slots, dim)."""
        own = everything.narrow(1, self.first, len(self.heads) * self.slots)
        return own.view(own.shape[0], len(self.heads), self.slots, own.shape[2])

    @cached_property
    def index(self) -> Tensor | slice:
        """Index of the set's heads among all, on their device: a copy for every token would wait for the GPU."""
        return slice(None) if len(self.heads) == self.num_kv_heads else self.heads.to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position in the sequence of every slot, (heads, slots), on the keys' device."""
        slots = self.blocks[:, :, None] * self.block + torch.arange(self.block)
        return slots.flatten(1).to(self.device)

    def row_mask(self, row: int, pattern: BlockPattern) -> Tensor | None:
        """Mark the slots that the queries of one pattern row attend to, (heads, group, 1, slots); None: all of them.

        The result is kept until another row is asked for, as decoding stays in a row for many tokens.
        """
        if row != self._row:
            keep = self.block_mask(row, row + 1, pattern)
            slots = keep.repeat_interleave(self.block, -1).to(self.device)
            self._row, self._row_mask = row, None if bool(keep.all()) else slots
        return self._row_mask

    def block_mask(self, first_row: int, end_row: int, pattern: BlockPattern) -> Tensor:
        """Mark the held blocks that rows of the pattern attend to, (heads, group, rows, blocks), on the CPU."""
        cols = int(self.blocks.max()) + 1 if self.blocks.numel() else 0
        keep = torch.unflatten(pattern.keep_rows(first_row, end_row, cols), 0, (self.num_kv_heads, -1))[self.heads]
        return keep.take_along_dim(self.blocks[:, None, None, :], -1)


class HeadKeys(NamedTuple):
    """Keys and values that one KV head holds."""

    blocks: Tensor
    """Key blocks, ascending, int64, on the CPU."""
    keys: Tensor
    """(batch, slots, head_dim); the last block may be partly filled."""
    values: Tensor
    """(batch, slots, value_dim)."""


@dataclass(eq=False)
class HeldKeys:
    """Keys and values of all heads, side by side in one tensor each, so that one kernel reaches them all.

    The heads of a set stand side by side, so that it is a view.
    """

    keys: Tensor
    """(batch, slots, head_dim)."""
    values: Tensor
    """(batch, slots, value_dim)."""
    head_sets: tuple[HeadSet, ...]
    """Every KV head is in one of them, and each holds the latest block."""
    blocks: HeldBlocks
    """Where each head's blocks stand."""
    ends: Tensor
    """Per KV head, the slot after its last one, int64, on the keys' device."""

    @classmethod
    def gather(cls, heads: list[HeadKeys], kept: list[Tensor], room: int, block: int, length: int) -> HeldKeys:
        """Copy the kept blocks of each head, with room for later tokens.

        Args:
            heads: Keys and values of every KV head.
            kept: Per KV head, the places of the kept blocks among its blocks, ascending.
            room: Number of blocks to leave room for, after the last one of the sequence.
            block: Tokens per key block.
            length: Tokens of the sequence, evicted ones included.
        """
        fresh = torch.arange(room) + num_blocks(length, block)
        of_count: dict[int, list[int]] = {}
        for head, places in enumerate(kept):
            of_count.setdefault(len(places), []).append(head)
        total = sum(len(places) + room for places in kept) * block
        keys, values = (like.new_empty(len(like), total, like.shape[2]) for like in heads[0][1:])
        place = torch.full((len(heads), num_blocks(length, block) + room), -1)
        ends, head_sets, first = torch.empty(len(heads), dtype=torch.int64), [], 0
        for count, members in sorted(of_count.items()):
            blocks = torch.stack([torch.cat([heads[head].blocks[kept[head]], fresh]) for head in members])
            head_sets.append(HeadSet(torch.tensor(members), len(heads), blocks, block, first, keys.device))
            for head, own in zip(members, blocks, strict=True):
                place[head, own] = torch.arange(count + room) + first // block
                slots = (kept[head][:, None] * block + torch.arange(block)).flatten()
                # Only the sequence's last block may be partly filled; a prompt has no room after it.
                partly = count > 0 and int(own[count - 1]) == length // block
                slots = slots[: count * block - (-length % block if partly else 0)].to(keys.device)
                keys[:, first : first + len(slots)] = heads[head].keys[:, slots]
                values[:, first : first + len(slots)] = heads[head].values[:, slots]
                first += (count + room) * block
                ends[head] = first
        return cls(keys, values, tuple(head_sets), HeldBlocks(place), ends.to(keys.device))

    def heads(self) -> list[HeadKeys]:
        """Return the keys and values of each KV head, in order."""
        found = {
            head: HeadKeys(head_set.blocks[place], head_set.of(self.keys)[:, place], head_set.of(self.values)[:, place])
            for head_set in self.head_sets
            for place, head in enumerate(head_set.heads.tolist())
        }
        return [found[head] for head in sorted(found)]

    def write(self, keys: Tensor, values: Tensor, behind: int) -> None:
        """Write new tokens, (batch, num_kv_heads, tokens, channels), into the room that is left.

        Each head has `behind` slots from the first new token to its end.
        """
        slots = (self.ends[:, None] - behind + torch.arange(keys.shape[2], device=keys.device)).flatten()
        self.keys[:, slots] = keys.flatten(1, 2)
        self.values[:, slots] = values.flatten(1, 2)

    def spread(self, length: int) -> tuple[Tensor, Tensor]:
        """Copy keys and values to their positions, (batch, num_kv_heads, length, channels); what was evicted is any."""
        place, block = self.blocks.place.clamp(min=0), self.head_sets[0].block
        slots = (place[:, :, None] * block + torch.arange(block)).flatten(1)[:, :length].to(self.keys.device)
        return self.keys[:, slots], self.values[:, slots]

    def chosen(self, change: Callable[[Tensor], Tensor]) -> HeldKeys:
        """Return the same for other samples of the batch, which `change` selects from keys and values."""
        return replace(self, keys=change(self.keys), values=change(self.values))


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """All keys and values that a layer's cache holds, those of the latest queries included.

    The model's code gets it from its cache in place of both tensors and passes it on. It is not a tensor: any code but
    an attached attention layer fails on it, instead of mistaking some keys for all of them.
    """

    held: HeldKeys
    """The keys and values that are left."""
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

    def attend(self, query: Tensor, options: AttentionOptions, decode: Decode | None = None) -> Tensor:
        """Compute attention of the last queries: by a backend's decoding, by the pattern's rows, or under a mask.

        Masks are over all keys of the sequence; dropout is not applied. Rows that may attend to nothing are zero.
        """
        q_len, held = query.shape[2], self.held
        num_kv_heads = self.shape[1]
        if decode is not None:
            undropped = replace(options, dropout_p=0.0, seed=None)
            keys, values = held.keys[:, None], held.values[:, None]
            decoded = decode(query, keys, values, self.pattern, undropped, held.blocks, self.shape[2])
            if decoded is not None:
                return decoded
        if spans_rows(self.pattern, q_len):
            return attend_chunk(query, *held.spread(self.shape[2]), self.pattern, replace(options, dropout_p=0.0))
        grouped = torch.unflatten(query, 1, (num_kv_heads, -1))  # (batch, kv_heads, group, q_len, head_dim)
        output: Tensor | None = None
        for head_set in held.head_sets:
            used, index = head_set.slots - -self.shape[2] % head_set.block, head_set.index
            mask = self._mask(head_set, q_len, used, options)
            if mask is not None:
                mask = mask.expand(-1, -1, grouped.shape[2], q_len, -1).flatten(2, 3)
            # The group's queries become rows of one head, so that keys are not repeated.
            rows = grouped[:, index].flatten(2, 3)
            keys, values = head_set.of(held.keys)[:, :, :used], head_set.of(held.values)[:, :, :used]
            found = masked_attention(rows, keys, values, mask, options)
            if output is None:  # autocast may give another type than the query's
                output = found.new_empty(*grouped.shape[:-1], found.shape[-1])
            output[:, index] = torch.unflatten(found, 2, (-1, q_len))
        assert output is not None
        return output.flatten(1, 2)

    def _mask(self, head_set: HeadSet, q_len: int, used: int, options: AttentionOptions) -> Tensor | None:
        """Mark the slots that each query attends to, (batch or 1, heads, group or 1, q_len or 1, used); None: all."""
        block_q, block_kv = self.pattern.block_size
        _, num_kv_heads, length, _ = self.shape
        start, device = length - q_len, head_set.device
        if q_len == 1:
            mask = head_set.row_mask(start // block_q, self.pattern)
            mask = None if mask is None else mask[None, ..., :used]
        else:
            query = torch.arange(start, length)
            first, end = start // block_q, (length - 1) // block_q + 1
            keep = head_set.block_mask(first, end, self.pattern)[:, :, query // block_q - first]
            keep = keep.to(device).repeat_interleave(block_kv, -1)[..., :used]
            position = head_set.positions[:, None, None, :used]
            mask = (keep & (position <= query[:, None].to(device)))[None]
        visible = options.token_mask(q_len, length, device)  # (batch, heads or 1, q_len or 1, length)
        if visible is None:
            return mask
        by_head = visible[:, None]
        if visible.shape[1] > 1:
            by_head = torch.unflatten(visible, 1, (num_kv_heads, -1))[:, head_set.index]
        seen = by_head.take_along_dim(head_set.positions[None, :, None, None, :used], -1)
        return seen if mask is None else mask & seen


def _misused(operation: str) -> str:
    return (
        "Keys and values of a `PatternCache` must be passed on unchanged to an attached attention layer, got "
        f"`{operation}`. If the model was detached, call `sparse_prune.attention.attach(model)`. Otherwise its code "
        "changes keys or values after the cache: use a cache that evicts nothing, such as DynamicCache()."
    )
