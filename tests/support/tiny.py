"""A language model small enough to train in a test."""

import pytorch_lightning as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import Constraints, CubicSchedule
from sparse_prune.callbacks import AttentionPruning
from sparse_prune.export.history import frame_steps, load_frame
from sparse_prune.recipes.base.loader import ResumableDataLoader

LENGTH, BLOCK = 64, 8


def tiny_llama(**changes):
    torch.manual_seed(0)
    config = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


class Tiny:
    """What `TinyModule` is beside a LightningModule, of whichever package."""

    def __init__(self, model=None, log_losses=None):
        super().__init__()
        self.model = tiny_llama() if model is None else model
        self.losses = [] if log_losses is None else log_losses

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.model(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class TinyModule(Tiny, pl.LightningModule):
    pass


def batches(count=64, batch_size=2):
    tokens = torch.randint(0, 32, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return ResumableDataLoader(tokens, batch_size=batch_size)


def pruning(final=0.4, end_step=6, every_n_steps=1, **changes):
    schedule = CubicSchedule(final=final, end_step=end_step)
    changes = {"constraints": Constraints(hysteresis=0.2), "retrieval": None} | changes
    return AttentionPruning(
        schedule, **{"block_size": BLOCK, "every_n_steps": every_n_steps, "min_delta": 0.5, "patience": 2, **changes}
    )


def load_frames(folder):
    """Step -> patterns, of a run's history."""
    return {step: load_frame(folder, step) for step in frame_steps(folder)}


def trainer(path, callbacks, steps=12, package=pl, **changes):
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "default_root_dir": path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return package.Trainer(callbacks=callbacks, **{**settings, **changes})
