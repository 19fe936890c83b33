"""Several processes: their statistics added up, and work that one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.pattern import num_blocks
from sparse_prune.scores import BlockStatistics

_Result = TypeVar("_Result")
_PATIENCE = timedelta(days=1)


def sum_over_ranks(
    statistics: dict[str, BlockStatistics], device: torch.device | str = "cpu"
) -> dict[str, BlockStatistics]:
    """Every rank's statistics, added in rank order: all ranks get the same bits.

    An all-reduce may add in any order. Here every rank adds one piece of the blocks, for all, and hands out the sums:
    a rank sends 2 * (ranks - 1) / ranks numbers per number, however many ranks there are, and none does more than
    another. Numbers travel as float32, in which the probe computes, and are added as float64; counts of rows are exact
    up to 2**24. One layer goes after the other, so that little is held beside the statistics.

    Args:
        statistics: Layer -> what this rank saw; layers that it did not run are missing. Lengths may differ by rank.
        device: Where the backend of torch.distributed wants its tensors: the CPU for gloo, a GPU for NCCL.

    Returns:
        Layer -> float64 sums on the CPU, for the layers that any rank has, in the same order on all ranks.
    """
    return {name: _summed(statistics.get(name), like, device) for name, like in _layers(statistics).items()}


def _layers(statistics: dict[str, BlockStatistics]) -> dict[str, BlockStatistics]:
    """Layer -> statistics without data, on the meta device, with room for those of all ranks."""
    mine = {name: (seen.sums.shape, seen.counts.shape, seen.kinds) for name, seen in statistics.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    layers: dict[str, BlockStatistics] = {}
    for part in gathered:
        for name, (shape, counted, kinds) in part.items():
            counts = torch.empty(counted, device="meta")
            seen = BlockStatistics(torch.empty(shape, device="meta"), counts, kinds)
            layers[name] = layers[name] + seen if name in layers else seen
    return layers


def _summed(seen: BlockStatistics | None, like: BlockStatistics, device: torch.device | str) -> BlockStatistics:
    """One layer's statistics over all ranks; `like` tells the shape and kinds."""
    if seen is None:
        seen = BlockStatistics(torch.zeros(like.sums.shape), torch.zeros(like.counts.shape), like.kinds)
    grown = seen.grown(*like.sums.shape[2:])
    grown = grown.of_blocks() if like.counts.dim() == 3 else grown
    numbers = torch.cat([part.float().flatten() for part in (grown.sums, grown.counts)]).to(device)
    total, count = _sum_in_rank_order(numbers).cpu().double(), like.sums.numel()
    return BlockStatistics(total[:count].view(like.sums.shape), total[count:].view(like.counts.shape), like.kinds)


def _sum_in_rank_order(numbers: Tensor) -> Tensor:
    """The sum over ranks of as many float32 numbers on each, (n,)."""
    ranks = dist.get_world_size()
    piece = num_blocks(len(numbers), ranks)
    sent = F.pad(numbers, (0, piece * ranks - len(numbers)))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)  # every rank's part of the piece that this rank adds
    total = torch.zeros(piece, dtype=torch.float64, device=sent.device)
    for part in received.view(ranks, piece):
        total += part
    dist.all_gather(list(received.view(ranks, piece)), total.float())
    return received[: len(numbers)]


def on_first_rank(work: Callable[[], _Result]) -> _Result:
    """Do something on rank 0 while all other ranks wait; every rank gets the result. Every rank must call it.

    A collective of the run gives up after minutes, an export or a measurement may take longer: the ranks wait in a
    gloo group of their own, for a day at most. Should the process of rank 0 die, they stop waiting at once.

    Args:
        work: What to do; its result is pickled for the other ranks.

    Raises:
        Exception: On rank 0, what `work` raises.
        RuntimeError: On the other ranks, if `work` failed on rank 0.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    group = _waiting_group(dist.group.WORLD)
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if is_first_rank():
        try:
            outcome[0] = work()
        except Exception as raised:
            error, outcome[1] = raised, f"{type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome, src=0, group=group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RuntimeError(f"Rank {dist.get_rank()} ends because rank 0 failed, whose log tells more: {outcome[1]}")
    result: _Result = outcome[0]
    return result


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return rank()[0] == 0


def rank() -> tuple[int, int]:
    """The number of this process among those of a run, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_all_ranks(value: _Result) -> list[_Result]:
    """Every rank's value, in their order. Every rank must call it.

    Args:
        value: What can be pickled.
    """
    gathered: list[Any] = [value] * rank()[1]
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


@lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """One for as long as the run's own group lasts."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group
