"""The base of the recipes' modules: optimizer, trained parameters, held-out loss."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.held_out import HeldOutMean


class FineTuneModule(pl.LightningModule):
    """Trains `model` by AdamW; the learning rate is warmed up linearly, then constant.

    A recipe's module takes plain hyperparameters and saves them, so that the command line can build its dense twin.

    Args:
        model: The model to train.
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.

    Raises:
        ValueError: If a value is out of range or `train_only` matches nothing.
    """

    def __init__(
        self,
        model: Any,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        train_only: str | None = None,
    ) -> None:
        super().__init__()
        check_range("(0, inf)", learning_rate=learning_rate)
        check_range("[0, inf)", warmup_steps=warmup_steps, weight_decay=weight_decay)
        self.model = model
        self.val_loss, self.test_loss = HeldOutMean(), HeldOutMean()
        self._rate, self._warmup, self._decay = learning_rate, warmup_steps, weight_decay
        if train_only is not None:
            _freeze_all_but(model, train_only)

    def log_held_out(self, split: Literal["val", "test"], loss: Tensor, counted: int, prog_bar: bool = True) -> None:
        """Log `<split>/loss`, the mean over the examples of all batches and processes."""
        mean = self.val_loss if split == "val" else self.test_loss
        mean.update(loss, counted)
        self.log(f"{split}/loss", mean, prog_bar=prog_bar, batch_size=1)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self._rate, weight_decay=self._decay)
        warmup = max(1, self._warmup)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _freeze_all_but(model: nn.Module, train_only: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    try:
        trained = {name for name in names if re.search(train_only, name)}
    except re.error as error:
        raise ValueError(f"`train_only` must be a regular expression, got {train_only!r}: {error}.") from error
    if not trained:
        raise ValueError(f"`train_only` must match parameter names such as {names[:4]}, got {train_only!r}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
