"""Refuses statistics from which no decision can be made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from sparse_prune.scores.score import Score
from sparse_prune.scores.statistics import STATISTICS, BlockStatistics


def check_finite(statistics: Mapping[str, BlockStatistics]) -> None:
    """Refuse sums that are NaN or infinite; the message names the layer."""
    # NaN and infinity show in the sum, which is ten times as fast as a test of every block.
    bad = [name for name, seen in statistics.items() if not math.isfinite(float(seen.sums.sum()))]
    if not bad:
        return
    seen, count = statistics[bad[0]], f"{len(bad)} of {len(statistics)} layers"
    masses = seen.only(tuple(kind for kind in seen.kinds if kind in STATISTICS))
    if math.isfinite(float(masses.sums.sum())):
        raise ValueError(
            f"Layer {bad[0]!r}: the sums of the score {seen.kinds[0]} must be finite, got NaN or infinity ({count}). "
            "Clip gradients or lower the learning rate; for a score of your own, check its `add`."
        )
    raise ValueError(
        f"Layer {bad[0]!r}: attention logits must be finite, got NaN or infinity ({count}). Resume from an earlier "
        "checkpoint with a lower learning rate, or clip gradients."
    )


def check_gradients(statistics: Mapping[str, BlockStatistics], score: Score, exempt: Collection[str]) -> None:
    """Refuse layers that no gradient reached, for a score that sees gradients; the message names the first.

    Args:
        statistics: Layer -> statistics, with those of the score.
        score: The score.
        exempt: Layers that need no gradient.
    """
    without = [
        name
        for name, seen in statistics.items()
        if name not in exempt and float(seen.counts[0].sum()) > 0 and float(seen.of(score.kind)[1].sum()) == 0
    ]
    if without:
        raise ValueError(
            f"Layer {without[0]!r}: {score!r} needs the gradient of the loss in the layer's output, and no backward "
            f"pass reached it while the step was probed ({len(without)} of {len(statistics)} layers). Run the backward "
            "pass before `probe(False)`, with trainable weights in or below the layer; or add it to "
            "`protected_layers`, or use a score of the forward pass such as Max()."
        )
