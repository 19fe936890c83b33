"""What a pruned model can still do, and what it costs: loss, retrieval, cache, speed."""

from sparse_prune.evaluation.measures import (
    CacheCost,
    MakeCache,
    all_connections,
    cache_cost,
    fresh_cache,
    handles_of,
    live_bytes,
    mean_loss,
    retrieval,
    retrieval_prompts,
)

__all__ = [
    "CacheCost",
    "MakeCache",
    "all_connections",
    "cache_cost",
    "fresh_cache",
    "handles_of",
    "live_bytes",
    "mean_loss",
    "retrieval",
    "retrieval_prompts",
]
