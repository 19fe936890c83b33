"""Adds the divergence from the dense model to the loss of a LightningModule's training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from sparse_prune.callbacks.logits_module import module_with_logits
from sparse_prune.callbacks.training_step import StandIn
from sparse_prune.distillation import DenseTeacher, Distillation
from sparse_prune.metrics import DIVERGENCE
from sparse_prune.pruner import AttentionPruner


class DistilledStep:
    """Stands in for a module's `training_step` until `remove`.

    The step runs unchanged; the divergence is added to the loss that it returns, so that accumulation, loss scaling and
    every strategy treat it as part of the loss. It is logged as `prune/divergence`.

    Args:
        pl_module: The module whose model the pruner is attached to.
        pruner: The pruner.
        settings: Weight, temperature, and when to stop.

    Raises:
        ValueError: If the module optimizes manually, or the module that returns the logits is ambiguous.
    """

    def __init__(self, pl_module: pl.LightningModule, pruner: AttentionPruner, settings: Distillation) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"`distillation` needs automatic optimization, got {type(pl_module).__name__} with a manual one. "
                "Add `DenseTeacher.loss` to your own loss instead (sparse_prune.distillation)."
            )
        handles = [state.layer for state in pruner.layers.values()]
        module = module_with_logits(pl_module, pruner.layers, settings.module, "Distillation.module")
        self.pl_module, self.pruner, self.settings = pl_module, pruner, settings
        self.teacher = DenseTeacher(module, handles, settings.temperature)
        self._stand_in = StandIn(pl_module, self._run)

    def remove(self) -> None:
        """Put the module's own step back."""
        self._stand_in.remove()

    @property
    def active(self) -> bool:
        """Whether connections are pruned, and layers still move or `after_ramp` is set."""
        lacking = any(state.layer.mode != "dense" for state in self.pruner.layers.values())
        return lacking and (self.settings.after_ramp or bool(self.pruner.open_layers))

    def _run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return step(*args, **kwargs)
        with self.teacher.watch():
            output = step(*args, **kwargs)
        divergence = self.teacher.loss()
        if output is None or divergence is None:
            return output
        self.pl_module.log(DIVERGENCE.key, divergence.detach(), batch_size=1)
        if isinstance(output, Tensor):
            return output + self.settings.weight * divergence
        return {**output, "loss": output["loss"] + self.settings.weight * divergence}
