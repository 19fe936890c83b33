"""A pruner of two layers that no model has, fed with statistics."""

import torch

from sparse_prune import AttentionPruner, BlockStatistics, LinearSchedule
from sparse_prune.attention import PrunableAttention

HEADS = 4


def pruner(**changes):
    made = AttentionPruner(LinearSchedule(final=0.6, end_step=4), block_size=4, min_delta=1.0, **changes)
    made._begin([PrunableAttention(name, HEADS, 2, causal=True) for name in ("a", "b")])
    return made


def feed(pruner, step, blocks):
    """Statistics of a step, the same for every pruner; returns it."""
    generator = torch.Generator().manual_seed(step)
    for state in pruner.layers.values():
        sums = torch.rand(3, HEADS, blocks, blocks, generator=generator, dtype=torch.float64).tril()
        state.layer.statistics = BlockStatistics(sums, torch.full((2, 1, blocks, 1), 4.0, dtype=torch.float64))
    return pruner
