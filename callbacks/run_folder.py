"""Where a run keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytorch_lightning as pl

from sparse_prune.callbacks.lightning import classes


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of the run alone, which every rank must ask for: only the first one knows it.

    It is the `log_dir` of the first `CSVLogger`, wherever it stands: `sparse-prune report` reads the two together. A
    run without one has its files with the first logger: in the `log_dir` of a `TensorBoardLogger`; for others, such as
    W&B's and MLflow's, where Lightning keeps the run's checkpoints, `save_dir/name/version`. Without a logger, and
    instead of a `save_dir` that is None, it is `default_root_dir`.

    Args:
        trainer: With its loggers.
    """
    return Path(trainer.strategy.broadcast(os.fspath(_folder(trainer))))


def filled_folders(trainer: pl.Trainer) -> list[Path]:
    """Folders into which a run will write, as far as its Trainer says so before the start: logs, checkpoints.

    Args:
        trainer: With its loggers and callbacks.
    """
    found = [logger.log_dir or logger.save_dir for logger in trainer.loggers] or [trainer.default_root_dir]
    found += [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(folder) for folder in found if folder]


def _folder(trainer: pl.Trainer) -> str | os.PathLike[str]:
    csv, tensorboard = classes("loggers.CSVLogger"), classes("loggers.TensorBoardLogger")
    logger = next((found for found in trainer.loggers if isinstance(found, csv)), trainer.logger)
    if logger is None:
        return trainer.default_root_dir
    if isinstance(logger, csv + tensorboard):
        return str(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
