"""Records the steps of a run, for the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytorch_lightning as pl
from typing_extensions import override

from sparse_prune.callbacks import AttentionPruning
from sparse_prune.clock import now

Phase = Literal["dense", "masked", "sparse"]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, with all batches that it accumulates."""

    step: int
    """Optimizer steps taken, this one included."""
    loss: float
    """Mean over its batches."""
    seconds: float
    """Time of forward, backward and optimizer until the device has finished, without decisions, swaps and logging."""
    phase: Phase
    """sparse: every layer is swapped; masked: pruning is under way; dense: nothing is pruned yet."""
    probed: bool
    sparsity: float
    """Share of the possible blocks that is pruned in this step."""
    requested: float | None = None
    """Share that the schedule asked for at the latest decision; None before it, and for a schedule of thresholds."""


class RunHistory(pl.Callback):
    """Records loss, time and phase of every optimizer step. Put it before the other callbacks."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self._start = 0.0
        self._step = 0  # optimizer steps done when the last step ended
        self._losses: list[float] = []  # of the batches since then
        self._seconds = 0.0  # likewise

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._losses, self._seconds = trainer.global_step, [], 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = now(pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += now(pl_module.device) - self._start
        # Lightning divides the loss, so that the sum of gradients is their mean.
        self._losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.global_step > self._step:
            self.records.append(self._record(trainer))
            self._step, self._losses, self._seconds = trainer.global_step, [], 0.0

    def _record(self, trainer: pl.Trainer) -> StepRecord:
        """Make the record of the step that just ended."""
        found = [c for c in trainer.callbacks if isinstance(c, AttentionPruning)]  # type: ignore[attr-defined]
        layers = [state.layer for state in found[0].pruner.layers.values()] if found else []
        modes = {layer.mode for layer in layers}
        phase: Phase = "dense" if modes <= {"dense"} else "sparse" if "masked" not in modes else "masked"
        probed = any(layer.statistics is not None for layer in layers)
        sparsity = found[0].pruner.total_sparsity if found else 0.0
        decision = found[0].report if found and found[0].pruner.sparsity is not None else None
        requested = None if decision is None else decision.requested
        loss = sum(self._losses) / len(self._losses)
        return StepRecord(trainer.global_step, loss, self._seconds, phase, probed, sparsity, requested)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [StepRecord(**record) for record in state_dict["records"]]
