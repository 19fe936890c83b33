"""Index tables: which blocks a program visits, in the order in which it visits them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparse_prune.kernels.derived import derived
from sparse_prune.pattern import BlockPattern, possible_blocks


@dataclass(frozen=True, eq=False)
class Visits:
    """The blocks that each program visits, compressed; all tensors int32, contiguous, on one device.

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

    def tensors(self) -> list[Tensor]:
        """In the order in which kernels take them."""
        return [self.start, self.full, self.index, self.order]

    def check(self, programs: int, visited: int, device: torch.device) -> None:
        """Refuse tables that would make a kernel read outside its tensors. Reads them back: a host synchronisation.

        Args:
            programs: Programs that will be launched per sample.
            visited: Tiles that there are to visit.
            device: Device of the attention call.

        Raises:
            ValueError: If dtype, device, shape or an entry is wrong; the message names the table.
        """
        check_layout(self.tensors(), programs, device)
        start, full, index, order = (tensor.tolist() for tensor in self.tensors())
        counts = [stop - begin for begin, stop in zip(start, start[1:], strict=False)]
        if start[0] != 0 or start[-1] != len(index) - 1 or min(counts, default=0) < 0:
            raise ValueError(f"`start` must ascend from 0 to {len(index) - 1}, got {start[0]}..{start[-1]}.")
        if any(not 0 <= part <= count for part, count in zip(full, counts, strict=True)):
            raise ValueError("`full` must lie between 0 and the visits of its program.")
        if any(not 0 <= entry < max(visited, 1) for entry in index):
            raise ValueError(f"`index` must lie in 0..{visited - 1}, got {min(index)}..{max(index)}.")
        if sorted(order) != list(range(programs)):
            raise ValueError(f"`order` must hold every program 0..{programs - 1} once.")


def check_layout(tensors: list[Tensor], programs: int, device: torch.device) -> None:
    """What can be told of `Visits.tensors()` without reading them.

    Raises:
        ValueError: If dtype, device or shape is wrong; the message names the table.
    """
    sizes = {"start": programs + 1, "full": programs, "index": None, "order": programs}
    for (name, size), tensor in zip(sizes.items(), tensors, strict=True):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"Index table `{name}` must be contiguous int32, got {tensor.dtype}. Use `index_tables`.")
        if tensor.device != device:
            raise ValueError(f"Index table `{name}` must be on {device}, got {tensor.device}. Use `index_tables`.")
        if tensor.dim() != 1 or (size is not None and tensor.shape[0] != size) or not tensor.numel():
            raise ValueError(
                f"Index table `{name}` must have shape ({'visits + 1' if size is None else size},), "
                f"got {tuple(tensor.shape)}. Use `index_tables` with the pattern of this call."
            )


_SOUND = WeakIdKeyDictionary()  # index tensor -> the tables and tiles that it was found, or built, to be right with


def check_tables(tensors: list[Tensor], programs: int, visited: int, device: torch.device) -> None:
    """Refuse tables that do not fit a call. Those that `index_tables` did not build are read back once.

    Args:
        tensors: `Visits.tensors()`.
        programs: See `Visits.check`, like the rest.

    Raises:
        ValueError: As `Visits.check`.
    """
    check_layout(tensors, programs, device)
    record = (*map(id, tensors), visited)
    if _SOUND.get(tensors[2]) != record:
        Visits(*tensors).check(programs, visited, device)
        _SOUND[tensors[2]] = record


@dataclass(frozen=True, eq=False)
class IndexTables:
    """A pattern as visits of key tiles by query tiles, and the other way round."""

    rows: Visits
    """For output and query gradients: per (head, query tile) the key tiles."""
    cols: Visits
    """For key and value gradients: per (head, key tile) the query tiles."""
    tile: tuple[int, int]
    """Tokens per tile, (query, key); both divide the pattern's block."""


def index_tables(pattern: BlockPattern, tile: tuple[int, int], device: torch.device) -> IndexTables:
    """Tables of a pattern, built once per tile and device and kept as long as the pattern lives.

    They are built on the device, without a host synchronisation: a pattern that moves costs a training step no wait.

    Args:
        pattern: The connections to keep.
        tile: Tokens per tile, (query, key).
        device: Where the tables are needed.

    Raises:
        ValueError: If the tile does not divide the pattern's block.
    """
    if pattern.block_size[0] % tile[0] or pattern.block_size[1] % tile[1]:
        raise ValueError(f"`tile` must divide the pattern's block {pattern.block_size}, got {tile}.")

    def build() -> IndexTables:
        return build_tables(pattern, tile, sent(pattern.keep, device), count_tiles(pattern, tile))

    return derived(pattern, ("tables", tile, device), build)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without a wait for the GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def build_tables(pattern: BlockPattern, tile: tuple[int, int], keep: Tensor, total: int) -> IndexTables:
    """As `index_tables`; `keep` is the pattern's own on the device where the tables are wanted, `total` its tiles."""
    device, (block_q, block_kv) = keep.device, pattern.block_size
    possible = possible_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal, device)
    rows, cols = possible.shape
    keep = keep.repeat_interleave(block_q // tile[0], 1)[:, :rows]
    keep = keep.repeat_interleave(block_kv // tile[1], 2)[:, :, :cols] & possible
    full = _full(pattern, tile, possible)
    real = (torch.arange(rows, device=device) + 1) * tile[0] <= pattern.q_len  # of a column the queries are visited
    by_row = build_visits(keep, full, total)
    by_col = build_visits(keep.transpose(1, 2), (full & real[:, None]).T, total)
    for visits, visited in ((by_row, cols), (by_col, rows)):
        _SOUND[visits.index] = (*map(id, visits.tensors()), visited)
    return IndexTables(by_row, by_col, tile)


def count_tiles(pattern: BlockPattern, tile: tuple[int, int]) -> int:
    """Kept tiles, counted on the host, where the pattern lives."""
    possible = possible_blocks(pattern.q_len, pattern.kv_len, tile, pattern.causal)
    per_row, per_col = pattern.block_size[0] // tile[0], pattern.block_size[1] // tile[1]
    blocks = F.pad(possible, (0, -possible.shape[1] % per_col, 0, -possible.shape[0] % per_row))
    weight = blocks.view(blocks.shape[0] // per_row, per_row, -1, per_col).sum((1, 3))
    return int((pattern.keep * weight).sum())


def _full(pattern: BlockPattern, tile: tuple[int, int], possible: Tensor) -> Tensor:
    """Tiles whose every key is real and seen by every query, boolean, (q_tiles, kv_tiles)."""
    row = torch.arange(possible.shape[0], device=possible.device)[:, None]
    last_key = (torch.arange(possible.shape[1], device=possible.device) + 1) * tile[1] - 1
    full = (last_key < pattern.kv_len).expand_as(possible)
    if pattern.causal:
        full = full & (last_key <= row * tile[0] + pattern.kv_len - pattern.q_len)
    return full


def build_visits(keep: Tensor, full: Tensor, total: int) -> Visits:
    """`keep` (num_heads, tiles, visited) and `full` (tiles, visited) as compressed visits along the last axis.

    Every shape is known from `total`, the number of kept tiles, so that nothing waits for the device.
    """
    flat, whole = keep.flatten(0, 1), (keep & full).flatten(0, 1)
    count, wholes = flat.sum(1, dtype=torch.int32), whole.sum(1, dtype=torch.int32)
    start = F.pad(count.cumsum(0, dtype=torch.int32), (1, 0))
    # The place of a tile in its program's list: full ones first, those with an element mask behind them.
    among_whole = whole.cumsum(1, dtype=torch.int32)
    among_edge = (flat & ~whole).cumsum(1, dtype=torch.int32) + wholes[:, None]
    place = start[:-1, None] + torch.where(whole, among_whole, among_edge) - 1
    slot = torch.where(flat, place, total).flatten().long()
    visited = torch.arange(flat.shape[1], dtype=torch.int32, device=flat.device)
    index = torch.zeros(total + 1, dtype=torch.int32, device=flat.device)
    index.scatter_(0, slot, visited.expand_as(flat).flatten())
    index[total:] = 0  # pruned tiles were written here
    return Visits(start, wholes, index, count.sort(descending=True, stable=True).indices.int())
