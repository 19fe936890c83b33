"""A small run that logs to W&B and CSV, in a process of its own: `wandb_run.py FOLDER OPTIONS`."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger

from sparse_prune.callbacks import FallbackWandbLogger, KernelSwap, sparsity_logger
from support.tiny import TinyModule, batches, pruning, trainer


def idle_clock():
    """Seconds in which this thread neither ran nor stood in line for a core: a busy machine adds nothing to them."""
    ran, queued, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return time.perf_counter() - (ran + queued) / 1e9


class Pace(pl.Callback):
    """Seconds for which the training stood still, waiting for something, from the first batch to the last."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not hasattr(self, "start"):
            self.start = idle_clock()
        self.waited = idle_clock() - self.start


class Interruption(pl.Callback):
    """At a step, touches a file and waits until it is gone, or dies."""

    def __init__(self, step, flag):
        self.step, self.flag = step, flag

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.flag is None:
                raise KeyboardInterrupt
            self.flag.touch()
            while self.flag.exists():
                time.sleep(0.02)


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    sparsity_logger.UPLOAD_SECONDS = options.get("upload_seconds", sparsity_logger.UPLOAD_SECONDS)
    wandb_logger = FallbackWandbLogger(
        project="project",
        save_dir=folder,
        id=options.get("id"),
        init_timeout=3.0,
        finish_timeout=options.get("finish", 8.0),
    )
    csv = CSVLogger(folder, name="csv", version=options.get("part", ""))
    pace = Pace()
    callbacks = [pruning(), KernelSwap("gather"), pace]
    if "stop_at" in options:
        callbacks.append(Interruption(options["stop_at"], None))
    if "pause_at" in options:
        callbacks.append(Interruption(options["pause_at"], folder / "paused"))
    if "save_every" in options:
        callbacks.append(pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=options["save_every"]))
    changes = {"enable_checkpointing": "save_every" in options} | options.get("trainer", {})
    module = TinyModule()
    fit = trainer(folder, callbacks, steps=12, logger=[wandb_logger, csv], val_check_interval=4, **changes)
    fit.fit(module, batches(), batches(4), ckpt_path=options.get("resume"))
    if fit.is_global_zero:
        (folder / f"result{options.get('part', '')}.json").write_text(json.dumps([module.losses, pace.waited]))
