"""The scores that `statistic` and `criterion` name."""

from __future__ import annotations

from typing import Literal

from sparse_prune.scores.mass_share import MassShare
from sparse_prune.scores.row_mass import Max, Mean, MeanSquare
from sparse_prune.scores.score import Score
from sparse_prune.scores.statistics import STATISTICS, Statistic

Criterion = Literal["score", "row_mass"]


def score_of(statistic: Statistic, criterion: Criterion = "score") -> Score:
    """Return the score that a statistic of row mass and a criterion name.

    Args:
        statistic: "mean", "mean_square" or "max".
        criterion: "score"; or "row_mass" for `MassShare`, whatever the statistic.

    Raises:
        ValueError: If a name is unknown.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {STATISTICS}, got {statistic!r}.")
    if criterion not in ("score", "row_mass"):
        raise ValueError(f"`criterion` must be 'score' or 'row_mass', got {criterion!r}.")
    if criterion == "row_mass":
        return MassShare()
    named: dict[Statistic, type[Score]] = {"mean": Mean, "mean_square": MeanSquare, "max": Max}
    return named[statistic]()
