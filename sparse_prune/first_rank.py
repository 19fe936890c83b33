"""Work that one process does while the others wait for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist

_Result = TypeVar("_Result")
_PATIENCE = timedelta(days=1)


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
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


@lru_cache(maxsize=1)
def _waiting_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """One for as long as the run's own group lasts."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group
