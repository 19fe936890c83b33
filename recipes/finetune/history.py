"""What a run did, step by step, for the report."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytorch_lightning as pl
from sparse_prune.callbacks import AttentionPruning
from typing_extensions import override

Phase = Literal["dense", "masked", "sparse"]


@dataclass(frozen=True)
class StepRecord:
    """One training batch."""

    step: int
    loss: float
    seconds: float
    """Forward, backward and optimizer; decisions, swaps and logging left out."""
    phase: Phase
    """sparse: every layer is swapped; masked: pruning is under way; dense: nothing is pruned yet."""
    probed: bool
    sparsity: float


class RunHistory(pl.Callback):
    """Records loss, time and phase of every training batch. Put it before the other callbacks."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._start
        found = [c for c in trainer.callbacks if isinstance(c, AttentionPruning)]  # type: ignore[attr-defined]
        layers = [state.layer for state in found[0].pruner.layers.values()] if found else []
        modes = {layer.mode for layer in layers}
        phase: Phase = "dense" if modes <= {"dense"} else "sparse" if "masked" not in modes else "masked"
        probed = any(layer.statistics is not None for layer in layers)
        sparsity = found[0].pruner.total_sparsity if found else 0.0
        loss = float(outputs["loss"])
        self.records.append(StepRecord(trainer.global_step, loss, seconds, phase, probed, sparsity))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [StepRecord(**record) for record in state_dict["records"]]
