"""Trainers under which pruning would fail late, or be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

if TYPE_CHECKING:
    from sparse_prune.callbacks.attention_pruning import AttentionPruning


def refuse_trainer(trainer: pl.Trainer, kind: type[AttentionPruning], stage: str) -> None:
    """Refuse a Trainer before it trains.

    Args:
        trainer: Of whatever package.
        kind: The pruning callback's class; its instances are counted.
        stage: As Lightning's `setup` gets it.

    Raises:
        TypeError: If the Trainer is of the package `lightning`.
        ValueError: If it holds several pruning callbacks, or trains in copies of this process.
    """
    if not isinstance(trainer, pl.Trainer):
        found = f"{type(trainer).__module__}.{type(trainer).__qualname__}"
        raise TypeError(
            f"`trainer` must be a Trainer of the package pytorch_lightning, got {found}. Write "
            "`import pytorch_lightning as pl` in the place of `import lightning as L`, and take Trainer, "
            "LightningModule, callbacks and loggers from it: both packages hold the same code, but neither knows the "
            "other's classes."
        )
    count = sum(isinstance(callback, kind) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if count > 1:
        raise ValueError(
            f"`Trainer(callbacks=...)` must hold one AttentionPruning, got {count}. Its `module` may name a common "
            "parent of all that is to be pruned."
        )
    if stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "`strategy` must not train in copies of this process, as ddp_spawn, ddp_fork and ddp_notebook do, got "
            f"{type(trainer.strategy).__name__} with {type(trainer.strategy.launcher).__name__}: the weights come back "
            "from there, the patterns do not. Use strategy='ddp', in a script."
        )
