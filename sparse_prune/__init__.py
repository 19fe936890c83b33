"""Gradual pruning of attention connections during fine-tuning."""

from sparse_prune.constraints import Constraints
from sparse_prune.layer_state import StabilityTracker
from sparse_prune.pattern import BlockPattern
from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner
from sparse_prune.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
)
from sparse_prune.scores import (
    AttentionCall,
    BlockStatistics,
    Influence,
    MassGradient,
    MassShare,
    Max,
    Mean,
    MeanSquare,
    OutputChange,
    Score,
    ScoreAverage,
    Tile,
    probe_blocks,
)
from sparse_prune.selection import LayerScores, select

__all__ = [
    "AttentionPruner",
    "PruneReport",
    "AttentionCall",
    "BlockPattern",
    "BlockStatistics",
    "ConstantSchedule",
    "Constraints",
    "CosineSchedule",
    "CubicSchedule",
    "ExponentialSchedule",
    "Influence",
    "LayerScores",
    "LinearSchedule",
    "MassGradient",
    "MassShare",
    "Max",
    "Mean",
    "MeanSquare",
    "OutputChange",
    "Schedule",
    "Score",
    "ScoreAverage",
    "StabilityTracker",
    "Tile",
    "probe_blocks",
    "select",
]
