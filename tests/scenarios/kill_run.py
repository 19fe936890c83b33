"""Runs that die by SIGKILL at points drawn by a seed, resumed until they end: `kill_run.py FOLDER KILLS`.

Everything is imported once; each try is a fork of this process, so that a kill is real and a start is cheap.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fsspec.implementations import local
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from sparse_prune.callbacks import KernelSwap, newest_checkpoint
from support.tiny import TinyModule, batches, pruning, trainer

STEPS = 12
SWAPS = ("before a swap", "during a swap", "after a swap")


class Fate:
    """Ends a try at the point that was drawn: the n-th of all that it passes, or the first of a name."""

    def __init__(self, log, drawn):
        self.log, self.drawn, self.passed = log, drawn, 0

    def passes(self, point):
        self.passed += 1
        if self.drawn in (self.passed, point):
            with open(self.log, "a") as file:
                file.write(f"{point}\n")
            os.kill(os.getpid(), signal.SIGKILL)


class Points(Callback):
    """Between the other callbacks and around them."""

    def __init__(self, fate, name):
        self.fate, self.name = fate, name

    def on_train_batch_start(self, trainer, *rest):
        self.fate.passes(f"{self.name}: step begins")

    def on_before_optimizer_step(self, *rest):
        self.fate.passes(f"{self.name}: before the optimizer step")

    def on_train_batch_end(self, trainer, *rest):
        self.fate.passes(f"{self.name}: step ends")


class FatefulSwap(KernelSwap):
    def __init__(self, fate):
        super().__init__("gather")
        self.fate = fate

    def _event(self, layer, step):
        self.fate.passes("before a swap" if layer.name.endswith("0.self_attn") else "during a swap")
        return super()._event(layer, step)

    def end_batch(self, *rest):
        before = len(self.events)
        super().end_batch(*rest)
        if len(self.events) > before:
            self.fate.passes("after a swap")


class TellingModule(TinyModule):
    """Writes every loss down at once, so that those of killed tries are kept."""

    def __init__(self, log):
        super().__init__()
        self.log_file = log

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with open(self.log_file, "a") as file:
            file.write(json.dumps([self.trainer.global_step, loss.item()]) + "\n")
        return loss


def fateful_files(fate):
    """Checkpoints are written in two halves, and moved to their place by copying, as between disks."""

    def write(opened, data):
        half = len(data) // 2
        opened.f.write(data[:half])
        opened.f.flush()
        fate.passes("while a checkpoint is written")
        opened.f.write(data[half:])
        return len(data)

    def commit(opened):
        data = Path(opened.temp).read_bytes()
        with open(opened.path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            fate.passes("while a checkpoint is moved")
            file.write(data[len(data) // 2 :])
        os.unlink(opened.temp)

    local.LocalFileOpener.write = write
    local.LocalFileOpener.commit = commit


def attempt(folder, drawn):
    """One try, from the newest checkpoint that is whole; writes its result if it gets to the end."""
    torch.set_num_threads(1)
    fate = Fate(folder / "deaths", drawn)
    fateful_files(fate)
    folder.mkdir(exist_ok=True)
    checkpoint = newest_checkpoint(folder)
    callback, swap = pruning(), FatefulSwap(fate)
    saver = ModelCheckpoint(folder / "checkpoints", save_top_k=-1, every_n_train_steps=1)
    callbacks = [Points(fate, "first"), callback, swap, saver, Points(fate, "last")]
    logger = CSVLogger(folder, name="csv", version="")
    fit = trainer(folder, callbacks, STEPS, logger=logger, enable_checkpointing=True)
    fit.fit(TellingModule(folder / "losses"), batches(), ckpt_path=checkpoint)
    result = {
        "patterns": {name: pattern.keep for name, pattern in callback.pruner.patterns.items()},
        "modes": [state.layer.mode for state in callback.pruner.layers.values()],
        "swaps": [(event.step, event.layer, event.backend) for event in swap.events],
    }
    torch.save(result, folder / "result")


def forked(folder, drawn):
    """Whether the try came to its end."""
    child = os.fork()
    if child == 0:
        with open(folder.parent / "output", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            attempt(folder, drawn)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    if os.waitstatus_to_exitcode(status):
        raise SystemExit((folder.parent / "output").read_text()[-3000:])
    return True


if __name__ == "__main__":
    target, kills = Path(sys.argv[1]), int(sys.argv[2])
    chance, dead, runs = random.Random(0), 0, 0
    assert forked(target / "whole", -1)
    while dead < kills:
        runs += 1
        while not forked(target / f"run{runs}", chance.choice([*SWAPS, *chance.sample(range(1, 60), 6)])):
            dead += 1
    print(json.dumps({"killed": dead, "runs": runs}))
