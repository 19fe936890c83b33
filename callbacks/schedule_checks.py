"""What a schedule asks for, held against what can be had."""

from __future__ import annotations

import logging

from sparse_prune.pruner import AttentionPruner
from sparse_prune.schedules import Schedule

log = logging.getLogger(__name__)


def warn_of_reach(pruner: AttentionPruner) -> None:
    """Say so if constraints keep more than the schedule ends with.

    Args:
        pruner: It has made its first decision.
    """
    if pruner.sparsity is None or not pruner.open_layers:
        return
    reachable, blocks = pruner.reachable_sparsity, max(state.scores.shape[2] for state in pruner.open_layers)
    if reachable < pruner.sparsity.final - 0.01:
        log.warning(
            "At most %.1f %% of the attention can be pruned in sequences like those of the first decision (%d blocks "
            "of %d keys), %.1f %% is asked for: the rest must stay. Use smaller blocks or longer sequences, or lower "
            "`sink_blocks`, `recent_blocks` or `min_density`, or protect fewer layers and heads.",
            100 * reachable,
            blocks,
            pruner.sides[1],
            100 * pruner.sparsity.final,
        )


def warn_of_return(pruner: AttentionPruner, step: int) -> None:
    """Say so if a model that was pruned before gets connections back.

    Args:
        pruner: It is attached and has made no decision; its schedule is in optimizer steps.
        step: Optimizer steps taken.
    """
    if pruner.sparsity is None:
        return
    there, asked = pruner.total_sparsity, pruner.sparsity(step + 1)
    if there <= asked + 0.01:
        return
    log.warning(
        "The model comes with %.1f %% of its attention pruned, and the schedule begins at %.1f %%: the first decision "
        "gives connections back. Let it begin where the model is (`initial=%.2f`), or leave AttentionPruning out to "
        "train with the patterns.",
        100 * there,
        100 * asked,
        there,
    )


def warn_of_change(before: str, schedule: Schedule, open_layers: bool) -> None:
    """Tell that a resumed run has another schedule than the one that was saved.

    Args:
        before: The saved one, in words.
        schedule: The one given now.
        open_layers: Whether the pattern of any layer may still move.
    """
    if open_layers:
        log.info("The schedule was %s in the checkpoint, the run goes on with %s.", before, schedule)
    else:
        log.warning(
            "The schedule was %s in the checkpoint and is %s now, which changes nothing: all layers have settled. "
            "Resume from a checkpoint of before they did.",
            before,
            schedule,
        )
