"""The base of the recipes' modules: which parameters are trained, and how."""

from __future__ import annotations

import re
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from typing_extensions import override


class FineTuneModule(pl.LightningModule):
    """Trains `model` by AdamW; the learning rate is warmed up linearly, then constant.

    A recipe's module takes plain hyperparameters and saves them, so that the command line can build its dense twin.

    Args:
        model: What is trained.
        learning_rate: Peak rate.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.

    Raises:
        ValueError: If a value is out of range or `train_only` matches nothing.
    """

    def __init__(
        self, model: Any, learning_rate: float, warmup_steps: int, weight_decay: float, train_only: str | None
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
        for name, value in (("warmup_steps", warmup_steps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        self.model = model
        self._rate, self._warmup, self._decay = learning_rate, warmup_steps, weight_decay
        if train_only is not None:
            _freeze_all_but(model, train_only)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self._rate, weight_decay=self._decay)
        warmup = max(1, self._warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _freeze_all_but(model: nn.Module, train_only: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not any(re.search(train_only, name) for name in names):
        raise ValueError(f"`train_only` must match parameter names such as {names[:4]}, got {train_only!r}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(train_only, name) is not None)
