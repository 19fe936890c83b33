"""Early refusals and warnings about the Trainer, the length of the run, and the schedule."""

from __future__ import annotations

import logging
import math

import pytorch_lightning as pl
import torch

from sparse_prune.attention.averages import likely_copies
from sparse_prune.callbacks.collaborator import Driver
from sparse_prune.callbacks.lightning import classes
from sparse_prune.pattern import BlockPattern, num_blocks, total_sparsity
from sparse_prune.pruner import AttentionPruner
from sparse_prune.schedules import Schedule
from sparse_prune.selection import LayerScores, select

log = logging.getLogger(__name__)

_SMALLEST_BLOCK = 16
"""Tokens per side that every backend takes."""


def refuse_trainer(trainer: pl.Trainer, stage: str) -> None:
    """Refuse a Trainer under which pruning would fail late, or be lost.

    Raises:
        ValueError: If it holds several pruning callbacks, or trains in copies of this process.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    count = sum(isinstance(callback, Driver) for callback in callbacks)
    if count > 1:
        raise ValueError(
            f"`Trainer(callbacks=...)` must hold one AttentionPruning, got {count}. Its `module` may name the common "
            "parent of several modules."
        )
    if stage == "fit" and isinstance(
        trainer.strategy.launcher, classes("strategies.launchers._MultiProcessingLauncher")
    ):
        raise ValueError(
            "`strategy` must not train in copies of this process, as ddp_spawn, ddp_fork and ddp_notebook do, got "
            f"{type(trainer.strategy).__name__} with {type(trainer.strategy.launcher).__name__}: these return weights, "
            "but no patterns. Use strategy='ddp', in a script."
        )


def steps_of_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Return the optimizer steps of the whole run, those before a resume included.

    None if they are unknown: with data without a length, or a module that steps its optimizers itself, maybe several
    times per batch.
    """
    total = _estimated(trainer)
    return int(total) if pl_module.automatic_optimization and 1 <= total < math.inf else None


def _estimated(trainer: pl.Trainer) -> float:
    """Correct Lightning's estimate by the accumulation that a scheduler sets for each epoch."""
    total: float = trainer.estimated_stepping_batches
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    kinds = classes("callbacks.GradientAccumulationScheduler")
    scheduler = next((found for found in callbacks if isinstance(found, kinds)), None)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if scheduler is None or epochs is None or epochs < 1 or batches == math.inf:
        return total
    steps: float = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps == -1 else min(steps, float(trainer.max_steps))


def in_steps(schedule: Schedule, total: int | None) -> Schedule:
    """Convert a schedule to optimizer steps.

    Raises:
        ValueError: If a step is a share and the run's length is unknown.
    """
    if total is None and schedule.relative:
        raise ValueError(
            "`begin_step` and `end_step` must be optimizer steps in a run of unknown length (data without a length, or "
            f"manual optimization), got {schedule.begin_step} and {schedule.end_step}. Give steps, or set "
            "Trainer(max_steps=...) if Lightning steps the optimizer."
        )
    return schedule if total is None else schedule.resolved(total)


def earliest_settling(schedule: Schedule, every_n_steps: int, patience: int) -> int:
    """Return the first optimizer step at which a layer can settle: the `patience`-th decision after the ramp."""
    waits = math.ceil(max(0, schedule.end_step - 1) / every_n_steps)
    return 1 + (waits + patience - 1) * every_n_steps


def warn_of_end(schedule: Schedule, total: int | None, every_n_steps: int, patience: int) -> None:
    """Warn if the run ends before any layer can settle."""
    first = earliest_settling(schedule, every_n_steps, patience)
    if total is not None and total < first:
        log.warning(
            "The schedule ends at step %d, training at step %d: no layer will settle, because none can before step %d "
            "(`patience` %d, `every_n_steps` %d). End the schedule earlier, or lower these.",
            schedule.end_step,
            total,
            first,
            patience,
            every_n_steps,
        )


def warn_of_begin(schedule: Schedule, step: int) -> None:
    """Warn if pruning begins in the middle of a ramp: its first decision would prune at once what the ramp spreads."""
    if schedule.begin_step < step and schedule.begin_step < schedule.end_step:
        log.warning(
            "The fit resumes at step %d without pruning so far, and the ramp began at step %d: the first decision asks "
            "for %.3g at once, because steps count from the run's first. Set `begin_step` to %d or later, and "
            "`end_step` after it, to prune gradually.",
            step,
            schedule.begin_step,
            schedule(step + 1),
            step,
        )


def warn_of_reach(pruner: AttentionPruner) -> None:
    """Warn if the constraints keep more than the schedule's final sparsity allows."""
    length = pruner.longest_call
    if pruner.sparsity is None or length is None:
        return
    reachable, wanted = _reach(pruner, pruner.sides), pruner.sparsity.final - 0.01
    if reachable < wanted:
        log.warning(
            "At most %.1f %% of the attention can be pruned in sequences of %d tokens (%d blocks of %d keys), but "
            "%.1f %% is asked for. %s",
            100 * reachable,
            length,
            num_blocks(length, pruner.sides[1]),
            pruner.sides[1],
            100 * pruner.sparsity.final,
            _what_would_do(pruner, length, wanted),
        )


def warn_of_copies(pruner: AttentionPruner) -> None:
    """Warn if layers that no training step runs are copies of others by their names: they stay dense."""
    unseen = {name for name, state in pruner.layers.items() if state.scores.empty}
    copies = likely_copies(sorted(unseen), pruner.layers.keys() - unseen)
    if copies:
        first = next(iter(copies))
        log.warning(
            "No training step runs the %d layers like %r, which have names like %r: they stay dense, in validation "
            "too. If they average the weights (EMA), make the average with torch.optim.swa_utils.AveragedModel or with "
            "Lightning's WeightAveraging, which get the patterns; if they are a dense reference, all is well.",
            len(copies),
            first,
            copies[first],
        )


def _what_would_do(pruner: AttentionPruner, length: int, wanted: float) -> str:
    """Tell the remedy for sequences of too few blocks."""
    halved = [(pruner.sides[0] >> fold, pruner.sides[1] >> fold) for fold in range(1, 8)]
    sizes = [sides for sides in halved if min(sides) >= _SMALLEST_BLOCK and _reach(pruner, sides) >= wanted]
    lengths = [length << fold for fold in range(1, 6) if _reach(pruner, pruner.sides, length << fold) >= wanted]
    found = [f"`block_size={size[0] if size[0] == size[1] else size}`" for size in sizes[:1]]
    found += [f"sequences of {tokens} tokens" for tokens in lengths[:1]]
    loosen = "ower `sink_blocks`, `recent_blocks` or `min_density`, or protect fewer layers and heads."
    return f"Use {' or '.join(found)}; or l{loosen}" if found else f"L{loosen}"


def _reach(pruner: AttentionPruner, sides: tuple[int, int], length: int | None = None) -> float:
    """Return the share of possible blocks that constraints allow to prune, at a length or those of the last calls."""
    layers = []
    for layer in (state.layer for state in pruner.layers.values()):
        if layer.last_shape is not None:
            tokens = length or layer.last_shape.q_len
            dense = BlockPattern.dense(layer.num_heads, tokens, tokens, sides, layer.causal)
            # Under `precision="bf16-true"` other tensors would be of bfloat16.
            scores = torch.ones(dense.keep.shape, dtype=torch.float32)
            layers.append(LayerScores(layer.name, scores, dense, layer.num_kv_heads))
    patterns, _ = select(layers, pruner.constraints, sparsity=1.0)
    return total_sparsity(patterns)


def warn_of_return(pruner: AttentionPruner, step: int) -> None:
    """Warn if a model that was pruned before gets connections back."""
    if pruner.sparsity is None:
        return
    there, asked = pruner.total_sparsity, pruner.sparsity(step + 1)
    if there <= asked + 0.01:
        return
    log.warning(
        "The model already has %.1f %% of its attention pruned, and the schedule begins at %.1f %%: the first decision "
        "gives connections back. Set `initial=%.2f` to begin where the model is, or leave AttentionPruning out to "
        "train with the patterns.",
        100 * there,
        100 * asked,
        there,
    )


def warn_of_change(before: str, schedule: Schedule, open_layers: bool) -> None:
    """Log that a resumed run has another schedule than its checkpoint."""
    if open_layers:
        log.info("The schedule was %s in the checkpoint; the run continues with %s.", before, schedule)
    else:
        log.warning(
            "The schedule was %s in the checkpoint and is %s now, which changes nothing, because all layers have "
            "settled. Resume from a checkpoint before that.",
            before,
            schedule,
        )
