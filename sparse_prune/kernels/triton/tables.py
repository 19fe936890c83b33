"""Index tables: which blocks a program visits, in the order in which it visits them."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_prune.pattern import BlockPattern, possible_blocks


@dataclass(frozen=True, eq=False)
class Visits:
    """The blocks that each program visits, compressed; all tensors int32 on one device.

    A program is (head, tile); it visits `index[start[p] : start[p + 1]]`, of which the first `full[p]` need no
    element mask.
    """

    start: Tensor
    """(programs + 1,)"""
    full: Tensor
    """(programs,)"""
    index: Tensor
    """(visits + 1,): full blocks ascending, then those on the diagonal or at a ragged end. One entry of padding, so
    that a program can load the next index ahead."""
    order: Tensor
    """(programs,): programs by descending number of visits, so that the longest start first."""


@dataclass(frozen=True, eq=False)
class IndexTables:
    """A pattern as visits of key tiles by query tiles, and the other way round."""

    rows: Visits
    """For output and query gradients: per (head, query tile) the key tiles."""
    cols: Visits
    """For key and value gradients: per (head, key tile) the query tiles."""
    tile: tuple[int, int]
    """Tokens per tile, (query, key); both divide the pattern's block."""


_CACHE: WeakKeyDictionary[BlockPattern, dict[tuple[tuple[int, int], torch.device], IndexTables]] = WeakKeyDictionary()


def index_tables(pattern: BlockPattern, tile: tuple[int, int], device: torch.device) -> IndexTables:
    """Tables of a pattern, built once per tile and device and kept as long as the pattern lives.

    Args:
        pattern: The connections to keep.
        tile: Tokens per tile, (query, key).
        device: Where the tables are needed.

    Raises:
        ValueError: If the tile does not divide the pattern's block.
    """
    if pattern.block_size[0] % tile[0] or pattern.block_size[1] % tile[1]:
        raise ValueError(f"`tile` must divide the pattern's block {pattern.block_size}, got {tile}.")
    known = _CACHE.setdefault(pattern, {})
    key = (tile, device)
    if key not in known:
        known[key] = _build(pattern, tile, device)
    return known[key]


def _build(pattern: BlockPattern, tile: tuple[int, int], device: torch.device) -> IndexTables:
    possible = possible_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal)
    keep = pattern.keep.repeat_interleave(pattern.block_size[0] // tile[0], 1)
    keep = keep.repeat_interleave(pattern.block_size[1] // tile[1], 2)
    keep = keep[:, : possible.shape[0], : possible.shape[1]] & possible
    full = _full(pattern, tile, possible)
    rows = _visits(keep, full, device)
    return IndexTables(rows, _visits(keep.transpose(1, 2), full.T, device), tile)


def _full(pattern: BlockPattern, tile: tuple[int, int], possible: Tensor) -> Tensor:
    """Tiles whose every key is real and seen by every query, boolean, (q_tiles, kv_tiles)."""
    row, col = torch.arange(possible.shape[0])[:, None], torch.arange(possible.shape[1])
    last_key = (col + 1) * tile[1] - 1
    full = (last_key < pattern.kv_len).expand_as(possible)
    if pattern.causal:
        full = full & (last_key <= row * tile[0] + pattern.kv_len - pattern.q_len)
    return full


def _visits(keep: Tensor, full: Tensor, device: torch.device) -> Visits:
    """`keep` (num_heads, tiles, visited) and `full` (tiles, visited) as compressed visits along the last axis."""
    flat = keep.reshape(-1, keep.shape[2])
    count = flat.sum(1)
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    # Full blocks sort before partial ones, those before pruned ones; within each kind the order stays.
    kind = torch.where(keep, torch.where(full, 0, 1), 2).reshape(flat.shape)
    order = kind.sort(dim=1, stable=True).indices
    index = order[torch.arange(flat.shape[1]) < count[:, None]]
    return Visits(
        start.to(device, torch.int32),
        (keep & full).reshape(flat.shape).sum(1).to(device, torch.int32),
        torch.cat([index, index.new_zeros(1)]).to(device, torch.int32),
        count.sort(descending=True, stable=True).indices.to(device, torch.int32),
    )
