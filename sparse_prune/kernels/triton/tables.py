"""Index tables: the blocks that a program visits, in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparse_prune.kernels.derived import derived
from sparse_prune.kernels.triton.configs import processors
from sparse_prune.pattern import BlockPattern, possible_blocks, whole_blocks

MEMBER_BIT = 20
"""Bits of an entry of `Visits.index` below this one hold the tile, those from it on which of a program's heads."""


@dataclass(frozen=True, eq=False)
class Visits:
    """The tiles that each program visits, compressed. All tensors are int32, contiguous, and on one device.

    A program is (head, tile), or (heads of a group, tile); it visits `index[start[p] : start[p + 1]]`, of which the
    first `full[p]` need no element mask.
    """

    start: Tensor
    """(programs + 1,)"""
    full: Tensor
    """(programs,)"""
    index: Tensor
    """(visits + 1,): full tiles ascending, then those on the diagonal or at a ragged end, of one head after the other.
    One entry of padding, so that a program can load the next index ahead."""
    order: Tensor
    """(programs,): programs by descending number of visits, so that the longest start first."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order in which kernels take them."""
        return [self.start, self.full, self.index, self.order]

    def check(self, programs: int, visited: int, device: torch.device, members: int = 1) -> None:
        """Refuse tables by which a kernel would read outside of its tensors.

        Reads the tables back: the host waits for the device.

        Args:
            programs: Programs a sample.
            visited: Tiles of one head that a program may visit.
            device: Where the kernel runs.
            members: Heads of a program.

        Raises:
            ValueError: If dtype, device, shape or an entry is wrong; the message names the table.
        """
        check_layout(self.tensors(), programs, device)
        start, full, index, order = (tensor.tolist() for tensor in self.tensors())
        counts = [stop - begin for begin, stop in zip(start, start[1:], strict=False)]
        if start[0] != 0 or start[-1] != len(index) - 1 or min(counts, default=0) < 0:
            _refuse("start", f"ascend from 0 to {len(index) - 1}", f"{start[0]}..{start[-1]}")
        if any(not 0 <= part <= count for part, count in zip(full, counts, strict=True)):
            _refuse("full", "lie between 0 and the visits of its program", f"{min(full)}..{max(full)}")
        entries = [divmod(entry, 1 << MEMBER_BIT) for entry in index]
        if any(not 0 <= member < members or tile >= max(visited, 1) for member, tile in entries):
            _refuse("index", f"lie in 0..{visited - 1} of {members} heads", f"{min(index)}..{max(index)}")
        if sorted(order) != list(range(programs)):
            _refuse("order", f"hold every program 0..{programs - 1} once", f"{min(order)}..{max(order)}")


def check_layout(tensors: list[Tensor], programs: int, device: torch.device) -> None:
    """Refuse tables of a wrong dtype, device or shape, by name."""
    sizes = {"start": programs + 1, "full": programs, "index": None, "order": programs}
    for (name, size), tensor in zip(sizes.items(), tensors, strict=True):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            _refuse(name, "be contiguous int32", tensor.dtype)
        if tensor.device != device:
            _refuse(name, f"be on {device}", tensor.device)
        if tensor.dim() != 1 or (size is not None and tensor.shape[0] != size) or not tensor.numel():
            _refuse(name, f"have shape ({'visits + 1' if size is None else size},)", tuple(tensor.shape))


def _refuse(name: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"Index table `{name}` must {wanted}, got {got}. Use `index_tables` with the pattern of the call.")


_SOUND = WeakIdKeyDictionary()  # index tensor -> the tables and sizes with which it was checked or built


def check_tables(tensors: list[Tensor], programs: int, visited: int, device: torch.device, members: int = 1) -> None:
    """Refuse tables as `Visits.check` does. Those that `index_tables` did not build are read back once."""
    check_layout(tensors, programs, device)
    record = _record(tensors, visited, members)
    if _SOUND.get(tensors[2]) != record:
        Visits(*tensors).check(programs, visited, device, members)
        _SOUND[tensors[2]] = record


def _record(tensors: list[Tensor], visited: int, members: int) -> tuple[int, ...]:
    return (*map(id, tensors), visited, members)


def index_tables(
    pattern: BlockPattern, tile: tuple[int, int], device: torch.device, members: int | None = None
) -> Visits:
    """Build tables of a pattern, once per kind and device; they are kept as long as the pattern lives.

    They are built on the device, without a host synchronisation: a pattern that moves costs a training step no wait.

    Args:
        pattern: The pattern.
        tile: Tokens per tile, (query, key).
        device: Where the tables are wanted.
        members: None: per (head, query tile) the key tiles, for output and query gradients. Else per (so many heads,
            key tile) the query tiles, for key and value gradients; see `heads_together`.

    Raises:
        ValueError: If the tile does not divide the pattern's block.
    """
    if pattern.block_size[0] % tile[0] or pattern.block_size[1] % tile[1]:
        raise ValueError(f"`tile` must divide the pattern's block {pattern.block_size}, got {tile}.")

    def build() -> Visits:
        return build_tables(pattern, tile, sent(pattern.keep, device), int(count_tiles(pattern, tile).sum()), members)

    return derived(pattern, ("tables", tile, device, members), build)


def heads_together(
    pattern: BlockPattern, tile: tuple[int, int], kv_heads: int, batch: int, device: torch.device
) -> int:
    """Return how many query heads a program of dk and dv takes: all of a KV group, or one.

    It takes the group unless its longest program would then be longer than a processor's share of all visits.
    """
    group, tiles = pattern.num_heads // kv_heads, pattern.block_size[1] // tile[1]
    counts = count_tiles(pattern, tile).unflatten(0, (kv_heads, group)).sum(1)
    longest = counts.max() / tiles
    return group if batch * counts.sum() >= processors(device) * longest else 1


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without a wait for the GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def build_tables(
    pattern: BlockPattern, tile: tuple[int, int], keep: Tensor, total: int, members: int | None = None
) -> Visits:
    """Build `index_tables` on the device of `keep`, which is the pattern's own; `total` is the number of kept tiles."""
    device, (block_q, block_kv) = keep.device, pattern.block_size
    possible = possible_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal, device)
    rows, cols = possible.shape
    keep = keep.repeat_interleave(block_q // tile[0], 1)[:, :rows]
    keep = keep.repeat_interleave(block_kv // tile[1], 2)[:, :, :cols] & possible
    full = whole_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal, device)
    if members is not None:
        real = (torch.arange(rows, device=device) + 1) * tile[0] <= pattern.q_len  # of a column the queries are visited
        keep, full = keep.transpose(1, 2), (full & real[:, None]).T
    found = build_visits(keep, full, total, members or 1)
    _SOUND[found.index] = _record(found.tensors(), keep.shape[2], members or 1)
    return found


def count_tiles(pattern: BlockPattern, tile: tuple[int, int]) -> Tensor:
    """Count the kept tiles of each head and column of blocks, once, on the host, where the pattern lives."""

    def count() -> Tensor:
        possible = possible_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal)
        per_row, per_col = pattern.block_size[0] // tile[0], pattern.block_size[1] // tile[1]
        blocks = F.pad(possible, (0, -possible.shape[1] % per_col, 0, -possible.shape[0] % per_row))
        weight = blocks.view(blocks.shape[0] // per_row, per_row, -1, per_col).sum((1, 3))
        return (pattern.keep * weight).sum(1)

    return derived(pattern, ("tiles", tile), count)


def build_visits(keep: Tensor, full: Tensor, total: int, members: int = 1) -> Visits:
    """Compress `keep` (num_heads, tiles, visited) and `full` (tiles, visited) to visits along the last axis.

    Every shape is known from `total`, the number of kept tiles, so that nothing waits for the device.
    """
    groups = (keep.shape[0] // members, members)
    flat, whole = (part.unflatten(0, groups).transpose(1, 2).flatten(0, 1).flatten(1) for part in (keep, keep & full))
    count, wholes = flat.sum(1, dtype=torch.int32), whole.sum(1, dtype=torch.int32)
    start = F.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
    # The place of a tile in its program's list: full ones first, those with an element mask behind them.
    among_whole = whole.cumsum(1, dtype=torch.int32)
    among_edge = (flat & ~whole).cumsum(1, dtype=torch.int32) + wholes[:, None]
    place = start[:-1, None] + torch.where(whole, among_whole, among_edge) - 1
    slot = torch.where(flat, place, total).flatten().long()
    member = torch.arange(members, dtype=torch.int32, device=flat.device)[:, None] << MEMBER_BIT
    visited = (member + torch.arange(keep.shape[2], dtype=torch.int32, device=flat.device)).flatten()
    index = torch.zeros(total + 1, dtype=torch.int32, device=flat.device)
    index.scatter_(0, slot, visited.expand_as(flat).flatten())
    index[total:] = 0  # pruned tiles were written here
    return Visits(start, wholes, index, count.sort(descending=True, stable=True).indices.int())
