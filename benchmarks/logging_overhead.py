"""What SparsityLogger costs: milliseconds per training step at the default cadence.

    python benchmarks/logging_overhead.py --output benchmarks/results/logging_overhead.json
    python benchmarks/logging_overhead.py --size 8 32 128 --steps 60 --output benchmarks/results/logging_8k.json

A model of SmolLM2-135M's 30 layers and 9 heads with 32 x 32 blocks, or of another size, and patterns that move; no
attention is computed. The callback's own work is timed: with a CSVLogger, and with an offline W&B run where wandb is
installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import LinearSchedule
from sparse_prune.attention.layer import CallShape
from sparse_prune.callbacks import AttentionPruning, KernelSwap, SparsityLogger
from sparse_prune.machine import describe_machine
from sparse_prune.scores import BlockStatistics

BLOCK = 64


class Size(NamedTuple):
    """What grows with the model."""

    layers: int = 30
    heads: int = 9
    blocks: int = 32
    """Per side of a pattern."""


DEFAULT = Size()


class TimedLogger(SparsityLogger):
    """Adds up what its work takes: metrics, pictures, history; and the end of a run, patterns and table included.

    Seconds are those of a clock on the wall; `cpu` are the training thread's own, to which a busy machine adds little.
    """

    seconds = end_seconds = cpu_seconds = cpu_end_seconds = 0.0

    def end_batch(self, *args: Any) -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        super().end_batch(*args)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.thread_time() - cpu

    def end_fit(self, *args: Any) -> None:
        start, cpu = time.perf_counter(), time.thread_time()
        super().end_fit(*args)
        self.end_seconds, self.cpu_end_seconds = time.perf_counter() - start, time.thread_time() - cpu


class Made(pl.LightningModule):
    """Its layers are never called: their statistics are drawn at random where a probe would collect them."""

    def __init__(self, pruning: AttentionPruning, size: Size) -> None:
        super().__init__()
        self.length = size.blocks * BLOCK
        sizes = {"vocab_size": 8, "hidden_size": size.heads * 2, "intermediate_size": 8}
        heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.heads}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=size.layers))
        self.weight = nn.Parameter(torch.zeros(()))
        self.pruning = [pruning]
        generator = torch.Generator().manual_seed(0)
        shape = (size.layers, 3, size.heads, size.blocks, size.blocks)
        self.scores = torch.rand(shape, generator=generator, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        for state, scores in zip(self.pruning[0].pruner.layers.values(), self.scores, strict=True):
            layer = state.layer
            layer.last_shape = CallShape(1, self.length, self.length, 64, torch.float32, torch.device("cpu"))
            if layer.probe_block_size is not None:
                noisy = scores * (1.0 + 0.1 * torch.rand_like(scores))
                layer.statistics = BlockStatistics(noisy, torch.ones(2, 1, scores.shape[-1], 1, dtype=torch.float64))
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def measure(steps: int, kind: str, size: Size = DEFAULT) -> dict[str, float]:
    """Milliseconds per step and per decision, seconds at the end, and the step of which that is 1 %, in seconds."""
    pruning, logger = AttentionPruning(LinearSchedule(final=0.7, end_step=10 * steps)), TimedLogger()
    with tempfile.TemporaryDirectory() as folder:
        loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
        if kind == "wandb":
            loggers.append(WandbLogger(project="overhead", save_dir=folder, offline=True))
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, logger=loggers, callbacks=[pruning, KernelSwap("gather"), logger],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Made(pruning, size), torch.utils.data.DataLoader(torch.zeros(steps, 1)))
        if kind == "wandb":
            loggers[-1].experiment.finish()
    decisions = -(-steps // pruning.every_n_steps)
    return {
        "ms_per_step": 1e3 * logger.seconds / steps,
        "ms_per_decision": 1e3 * logger.seconds / decisions,
        "end_seconds": logger.end_seconds,
        "cpu_ms_per_decision": 1e3 * logger.cpu_seconds / decisions,
        "cpu_end_seconds": logger.cpu_end_seconds,
        "one_percent_of_seconds": 100 * logger.seconds / steps,
    }


def main() -> None:
    """Parse arguments, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, nargs=3, default=[30, 9, 32], metavar=("LAYERS", "HEADS", "BLOCKS"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kinds = ["csv", *(["wandb"] if find_spec("wandb") else [])]
    size = Size(*arguments.size)
    found = {kind: measure(arguments.steps, kind, size) for kind in kinds}
    setting = {"steps": arguments.steps, "every_n_steps": 10, **size._asdict()}
    result = {**setting, **describe_machine(), "loggers": found}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
