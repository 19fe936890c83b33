"""Where a run keeps its files."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run alone, which every rank must ask for.

    It is `trainer.log_dir`, or `default_root_dir` without a logger. W&B's logger has one folder for all its runs: there
    it is the folder inside in which Lightning keeps the run's checkpoints.

    Args:
        trainer: Its first logger decides.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.loggers[0] if trainer.loggers else None
    if isinstance(logger, WandbLogger):
        # Only the first rank knows the run's id.
        folder = folder / str(logger.name) / str(trainer.strategy.broadcast(logger.version))
    return folder
