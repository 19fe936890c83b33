"""The folder of a run's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytorch_lightning as pl

from sparse_prune.callbacks.lightning import classes


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run. Every rank must call it, because only rank 0 knows the folder.

    It is the `log_dir` of the first `CSVLogger`, where `sparse-prune report` reads logs and patterns. Without
    one it belongs to the first logger: the `log_dir` of a `TensorBoardLogger`, or else `save_dir/name/version`, where
    Lightning writes the run's checkpoints. Without a logger, or for a `save_dir` that is None, it is
    `default_root_dir`.
    """
    return Path(trainer.strategy.broadcast(os.fspath(_folder(trainer))))


def filled_folders(trainer: pl.Trainer) -> list[Path]:
    """Return the folders that a run will write logs and checkpoints to, as far as they are known before the start."""
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
