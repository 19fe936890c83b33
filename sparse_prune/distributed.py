"""Collectives: statistics summed over ranks, and work that rank 0 does for all."""

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
    """Add up the statistics of all ranks in rank order, so that all ranks get the same bits.

    An all-reduce may add in any order. Here every rank adds one piece of the blocks for all and hands out the sums, so
    that a rank sends 2 * (ranks - 1) / ranks numbers per number. Numbers travel as float32, in which the probe
    computes, and are added as float64; counts of rows are exact up to 2**24. Layers follow one another, so that little
    memory is needed beside the statistics.

    Args:
        statistics: Layer -> statistics of this rank, without the layers that it did not run. Lengths may differ.
        device: Where the backend of torch.distributed wants its tensors: the CPU for gloo, a GPU for NCCL.

    Returns:
        Layer -> float64 sums on the CPU, for the layers that any rank ran, in the same order on all ranks.
    """
    return {name: _summed(statistics.get(name), like, device) for name, like in _layers(statistics).items()}


def _layers(statistics: dict[str, BlockStatistics]) -> dict[str, BlockStatistics]:
    """Map layers to statistics on the meta device, of the shape that the sum over all ranks has."""
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
    """Sum one layer's statistics over all ranks; `like` has the shape and kinds of the sum."""
    if seen is None:
        seen = BlockStatistics(torch.zeros(like.sums.shape), torch.zeros(like.counts.shape), like.kinds)
    grown = seen.grown(*like.sums.shape[2:])
    counts = grown.counts.expand(like.counts.shape)
    numbers = torch.cat([part.float().flatten() for part in (grown.sums, counts)]).to(device)
    total, count = _sum_in_rank_order(numbers).cpu().double(), like.sums.numel()
    return BlockStatistics(total[:count].view(like.sums.shape), total[count:].view(like.counts.shape), like.kinds)


def _sum_in_rank_order(numbers: Tensor) -> Tensor:
    """Sum float32 numbers, (n,), over ranks, in rank order."""
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
    """Do work on rank 0 while all other ranks wait, and return its result on every rank. Every rank must call it.

    A collective of the run times out after minutes, and an export or a measurement may take longer: so the ranks wait
    in a gloo group of their own, for a day at most. If the process of rank 0 dies, they stop waiting at once.

    Args:
        work: The work; its result is pickled for the other ranks.

    Raises:
        Exception: Whatever `work` raises, on rank 0.
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
        raise RuntimeError(f"Rank {dist.get_rank()} stops because rank 0 failed (see its log): {outcome[1]}")
    result: _Result = outcome[0]
    return result


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return rank()[0] == 0


def rank() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def from_all_ranks(value: _Result) -> list[_Result]:
    """Gather a value of every rank, in rank order. Every rank must call it.

    Args:
        value: It is pickled.
    """
    gathered: list[Any] = [value] * rank()[1]
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


@lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a gloo group, made once per default group."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group
