"""What a pruned model can still do, and what it costs: loss, retrieval, cache, speed."""

from sparse_prune.attention.modes import all_connections
from sparse_prune.evaluation.measures import (
    CacheCost,
    MakeCache,
    cache_cost,
    fresh_cache,
    handles_of,
    live_bytes,
    mean_loss,
)
from sparse_prune.evaluation.meter import TaskScore, measure_task
from sparse_prune.evaluation.tasks import TASKS

__all__ = [
    "TaskScore",
    "TASKS",
    "measure_task",
    "CacheCost",
    "MakeCache",
    "all_connections",
    "cache_cost",
    "fresh_cache",
    "handles_of",
    "live_bytes",
    "mean_loss",
]
