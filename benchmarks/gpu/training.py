"""A fine-tune without any download: models of random weights or of a folder, on the bytes of Python's own library."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from gpu.session import DEVICE
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sparse_prune import CubicSchedule
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from sparse_prune.recipes.base.loader import ResumableDataLoader

SIZES = {
    "tiny": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    ),
    "small": dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4
    ),
    "smollm2": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Name -> what makes a Llama of this size; head_dim 16, 64 and 64."""


def llama(size: str, length: int, folder: Path | None = None) -> Any:
    """A model that takes bytes for tokens: of random weights, the same each time, or that of a folder.

    A folder's model sees bytes for its first 256 tokens: times are its own, losses mean little.
    """
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=length, **SIZES[size]))


def text(length: int, count: int) -> Tensor:
    """(count, length) bytes of Python's standard library, in order."""
    found, wanted = bytearray(), length * count
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= wanted:
            break
    if len(found) < wanted:
        raise ValueError(f"`count` must be at most {len(found) // length} sequences of {length} bytes, got {count}.")
    return torch.frombuffer(found[:wanted], dtype=torch.uint8).long().view(count, length)


class Module(pl.LightningModule):
    """Predicts the next byte."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.losses: list[Tensor] = []
        """Of each step, on the device."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss, in nats per byte."""
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Steps(pl.Callback):
    """A row per step: wall clock, and of it what the host took before it had to wait for the device."""

    def __init__(self, pruning: AttentionPruning | None = None) -> None:
        self.pruning = pruning
        self.rows: list[dict[str, Any]] = []
        self._begin = self._measured = 0.0
        self._swapped = 0

    def _states(self) -> list[Any]:
        return list(self.pruning.pruner.layers.values()) if self.pruning else []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """The clock starts; nothing is left from the step before."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._swapped = sum(state.layer.mode == "sparse" for state in self._states())
        self._measured = self.pruning.swap.timer.seconds if self.pruning else 0.0
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The host is done, then the device is; what the swap measured in between is no part of the step."""
        host = time.perf_counter() - self._begin
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - self._begin
        self.rows.append(
            {
                "step": trainer.global_step, "wall_s": wall, "host_s": host, "loss": float(pl_module.losses[-1]),
                "measuring_s": self.pruning.swap.timer.seconds - self._measured if self.pruning else 0.0,
                "sparsity": self.pruning.pruner.total_sparsity if self._states() else 0.0,
                "swapped": self._swapped,
                "decided": bool(self.pruning) and (trainer.global_step - 1) % self.pruning.every_n_steps == 0,
                "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
            }
        )  # fmt: skip


def pruning(final: float, end_step: int, every: int, block: int, backend: str) -> AttentionPruning:
    """Patterns settle soon after `end_step`, and are swapped."""
    return AttentionPruning(
        CubicSchedule(final=final, end_step=end_step), block_size=block, every_n_steps=every, min_delta=1.0, patience=1,
        swap=KernelSwap(backend),
    )  # fmt: skip


def fit(
    module: Module, tokens: Tensor, callbacks: list[pl.Callback], steps: int, folder: Path, resume: Path | None = None
) -> pl.Trainer:
    """Train on the sequences in order, one a step, bf16-mixed on a GPU."""
    trainer = pl.Trainer(
        accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1, max_steps=steps, max_epochs=-1,
        precision="bf16-mixed" if DEVICE == "cuda" else "32-true", callbacks=callbacks, default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(
        module, ResumableDataLoader(tokens, batch_size=1), ckpt_path=resume, weights_only=False if resume else None
    )
    return trainer
