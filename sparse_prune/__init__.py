"""Gradual pruning of attention connections during fine-tuning."""

from sparse_prune.constraints import Constraints
from sparse_prune.layer_state import StabilityTracker
from sparse_prune.pattern import BlockPattern
from sparse_prune.pruner import AttentionPruner, PruneReport
from sparse_prune.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
)
from sparse_prune.scores import BlockStatistics, ScoreAverage, probe_blocks
from sparse_prune.selection import LayerScores, select

__all__ = [
    "AttentionPruner",
    "PruneReport",
    "BlockPattern",
    "BlockStatistics",
    "ConstantSchedule",
    "Constraints",
    "CosineSchedule",
    "CubicSchedule",
    "ExponentialSchedule",
    "LayerScores",
    "LinearSchedule",
    "Schedule",
    "ScoreAverage",
    "StabilityTracker",
    "probe_blocks",
    "select",
]
