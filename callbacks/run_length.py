"""What the length of a run means for its schedule."""

from __future__ import annotations

import logging
import math

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler

from sparse_prune.schedules import Schedule

log = logging.getLogger(__name__)


def steps_of_run(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer steps that the run takes in all, those before a resume included.

    None where nobody knows: data without a length, or a module that steps its optimizers itself, maybe several times a
    batch.

    Args:
        trainer: Its data are set up.
        pl_module: What it trains.
    """
    total = _estimated(trainer)
    return int(total) if pl_module.automatic_optimization and 1 <= total < math.inf else None


def _estimated(trainer: pl.Trainer) -> float:
    """Lightning's estimate, in which every epoch accumulates as many batches as its scheduler says."""
    total = trainer.estimated_stepping_batches
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((found for found in callbacks if isinstance(found, GradientAccumulationScheduler)), None)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if scheduler is None or epochs is None or epochs < 1 or batches == math.inf:
        return total
    steps = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)


def in_steps(schedule: Schedule, total: int | None) -> Schedule:
    """The schedule in optimizer steps.

    Args:
        schedule: Its steps may be shares of the run.
        total: Optimizer steps of the run; None: not known.

    Raises:
        ValueError: If a step is a share and the run's length is not known.
    """
    if total is None and schedule.relative:
        raise ValueError(
            "`begin_step` and `end_step` must be optimizer steps, as nobody knows how many this run takes (data "
            "without a length, or optimizers stepped by hand), got "
            f"{schedule.begin_step} and {schedule.end_step}. Give steps, or set Trainer(max_steps=...) where Lightning "
            "steps the optimizer."
        )
    return schedule if total is None else schedule.resolved(total)


def earliest_settling(schedule: Schedule, every_n_steps: int, patience: int) -> int:
    """The first optimizer step at which a layer can settle: the `patience`-th decision from the schedule's end on.

    Args:
        schedule: In optimizer steps.
        every_n_steps: Optimizer steps between decisions; the first falls on step 1.
        patience: Decisions that must stand still.
    """
    waits = math.ceil(max(0, schedule.end_step - 1) / every_n_steps)
    return 1 + (waits + patience - 1) * every_n_steps


def warn_of_end(schedule: Schedule, total: int | None, every_n_steps: int, patience: int) -> None:
    """Say so if the run ends before any layer can settle.

    Args:
        schedule: As for `earliest_settling`, like the last two.
        total: Optimizer steps of the run; None: not known.
        every_n_steps: See `earliest_settling`.
        patience: See `earliest_settling`.
    """
    first = earliest_settling(schedule, every_n_steps, patience)
    if total is not None and total < first:
        log.warning(
            "The schedule ends at step %d, training at step %d: no layer will settle, which takes until step %d at "
            "least (`patience` %d, `every_n_steps` %d). End the schedule earlier, or lower these.",
            schedule.end_step,
            total,
            first,
            patience,
            every_n_steps,
        )


def warn_of_begin(schedule: Schedule, step: int) -> None:
    """Say so if pruning begins in the middle of a ramp: its first decision would prune at once what the ramp spreads.

    Args:
        schedule: In optimizer steps.
        step: Optimizer steps taken, none of them with pruning.
    """
    if schedule.begin_step < step and schedule.begin_step < schedule.end_step:
        log.warning(
            "The fit goes on at step %d without pruning so far, and the ramp began at step %d: the first decision asks "
            "for %.3g at once, for steps count from the run's first. Set `begin_step` to %d or later, and `end_step` "
            "after it, to prune gradually.",
            step,
            schedule.begin_step,
            schedule(step + 1),
            step,
        )
