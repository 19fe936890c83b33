"""Logging of pictures, tables, artifacts, settings and summaries, as each kind of logger supports it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from sparse_prune.callbacks.lightning import classes
from sparse_prune.losses import loss_keys
from sparse_prune.metrics import HEAD_COLUMNS, TOKENS_PER_SECOND
from sparse_prune.pictures import LEGEND, LayerView, Picture, framed_atlas

log = logging.getLogger(__name__)

SUMMARIES = {
    **dict.fromkeys((*loss_keys("training"), *loss_keys("validation")), "min,last"),
    TOKENS_PER_SECOND.key: "mean,last",
}
"""Key -> the values that W&B's summary holds, if not the last one alone."""


def is_wandb(logger: Logger) -> TypeGuard[WandbLogger]:
    """Whether a logger is a WandbLogger of Lightning."""
    return isinstance(logger, classes("loggers.WandbLogger"))


def is_tensorboard(logger: Logger) -> TypeGuard[TensorBoardLogger]:
    """Whether a logger is a TensorBoardLogger of Lightning."""
    return isinstance(logger, classes("loggers.TensorBoardLogger"))


def takes_pictures(logger: Logger) -> bool:
    """Whether a logger supports pictures."""
    return is_wandb(logger) or is_tensorboard(logger)


def log_picture(logger: Logger, key: str, picture: Picture, step: int, caption: str) -> None:
    """Log a picture, if the logger supports pictures."""
    if is_wandb(logger):
        logger.log_image(key, [picture], step=step, caption=[caption])
    elif is_tensorboard(logger):
        logger.experiment.add_image(key, picture, step, dataformats="HWC")


def log_atlas(logger: Logger, layers: Sequence[LayerView], step: int) -> None:
    """Draw and log the atlas, if the logger supports pictures."""
    if takes_pictures(logger):
        log_picture(logger, "patterns/atlas", framed_atlas(layers), step, LEGEND)


def log_table(logger: WandbLogger, table: list[list[Any]], step: int) -> None:
    """Log the table of heads. W&B's client waits for the server."""
    logger.log_table("patterns/heads", columns=list(HEAD_COLUMNS), data=table, step=step)


def version_of(logger: WandbLogger, path: Path, aliases: list[str], metadata: dict[str, float]) -> Callable[[], object]:
    """Make a function that uploads the file, as it is now, as a version of the run's artifact."""
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"attention-pattern-{run.id}", type="attention-pattern", metadata=metadata)
    artifact.add_file(str(path))
    return partial(run.log_artifact, artifact, aliases=aliases)


def describe_metrics(logger: Logger) -> None:
    """Define W&B's summaries; Lightning's logger already makes trainer/global_step the axis of every key."""
    if is_wandb(logger):
        for key, summary in SUMMARIES.items():
            logger.experiment.define_metric(key, step_metric="trainer/global_step", summary=summary)


def log_settings(logger: Logger, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Log the settings of pruning as hyperparameters, with a warning if the logger refuses them."""
    if is_tensorboard(logger):  # it shows only the hyperparameters of the first call
        for part in (trainer.datamodule, trainer.lightning_module):  # type: ignore[attr-defined]
            if getattr(part, "_log_hyperparams", False):  # Lightning will log these
                settings = dict(part.hparams_initial) | settings
    try:
        logger.log_hyperparams(settings)
    except Exception as error:  # some loggers, such as MLflow's, refuse changes by a resumed run
        log.warning("%s takes no pruning settings as hyperparameters: %r", type(logger).__name__, error)


def log_summary(logger: Logger, summary: dict[str, float], step: int) -> None:
    """Log the summary of a finished run: in W&B's list of runs, or else among the metrics."""
    if is_wandb(logger):
        logger.experiment.summary.update(summary)
    else:
        logger.log_metrics(summary, step=step)
