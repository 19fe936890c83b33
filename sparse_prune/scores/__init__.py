"""Scores of blocks: the base class, the project's own scores, and their running average."""

from sparse_prune.scores.average import ScoreAverage
from sparse_prune.scores.call import AttentionCall, Tile
from sparse_prune.scores.far_field import FarField
from sparse_prune.scores.influence import Influence
from sparse_prune.scores.mass_gradient import MassGradient
from sparse_prune.scores.mass_share import MassShare
from sparse_prune.scores.named import Criterion, score_of
from sparse_prune.scores.output_change import OutputChange
from sparse_prune.scores.row_mass import Max, Mean, MeanSquare, probe_blocks
from sparse_prune.scores.score import Score
from sparse_prune.scores.statistics import STATISTICS, BlockStatistics, Statistic

__all__ = [
    "STATISTICS",
    "AttentionCall",
    "BlockStatistics",
    "Criterion",
    "FarField",
    "Influence",
    "MassGradient",
    "MassShare",
    "Max",
    "Mean",
    "MeanSquare",
    "OutputChange",
    "Score",
    "ScoreAverage",
    "Statistic",
    "Tile",
    "probe_blocks",
    "score_of",
]
