"""Everything works in the Lightning that a user imports: `pytorch_lightning` or `lightning.pytorch`, both installed."""

import copy
import subprocess
import sys
from importlib import import_module

import pytest
import torch
import yaml

from sparse_prune.callbacks import (
    AttentionPruning,
    FallbackWandbLogger,
    KernelSwap,
    SparsityLogger,
    restore_patterns,
)
from sparse_prune.callbacks.lightning import overrides
from sparse_prune.export import load_patterns
from support.logs import EXPECTED, read_csv
from support.tiny import BLOCK, Tiny, batches, load_frames, pruning, trainer

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
MODULES = {name: type("Module", (Tiny, import_module(name).LightningModule), {}) for name in PACKAGES}
DATA = {
    name: type("Data", (import_module(name).LightningDataModule,), {"train_dataloader": lambda self: batches()})
    for name in PACKAGES
}


@pytest.fixture(params=PACKAGES)
def name(request):
    return request.param


def test_train_prune_swap_log_save_resume_and_restore(name, tmp_path):
    package, module = import_module(name), MODULES[name]()
    loggers, callbacks = import_module(f"{name}.loggers"), import_module(f"{name}.callbacks")
    saver = callbacks.ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=5)
    callback = pruning()
    fit = trainer(
        tmp_path,
        [callback, KernelSwap("gather"), SparsityLogger(every_n_decisions=1), saver],
        steps=9,
        package=package,
        enable_checkpointing=True,
        logger=loggers.CSVLogger(tmp_path, name="", version=""),
    )
    assert type(fit).__module__.startswith(name)
    fit.fit(module, batches(), batches(4))
    assert {state.layer.mode for state in callback.pruner.layers.values()} == {"sparse"}
    assert set().union(*read_csv(tmp_path)) >= EXPECTED - {"val/loss"}
    assert load_frames(tmp_path)
    saved = load_patterns(tmp_path / "attention_pattern.safetensors")
    assert all(torch.equal(saved[layer].keep, pattern.keep) for layer, pattern in callback.pruner.patterns.items())

    again, resumed = MODULES[name](), pruning(swap=KernelSwap("gather"))
    more = trainer(tmp_path / "more", [resumed], steps=9, package=package)
    more.fit(again, batches(), ckpt_path=tmp_path / "cut.ckpt", weights_only=False)
    assert module.losses[5:] == again.losses
    assert resumed.swap.events == callback.swap.events
    more.save_checkpoint(tmp_path / "end.ckpt")

    for other in PACKAGES:  # trained in one, deployed in the other
        deployed = MODULES[other].load_from_checkpoint(tmp_path / "end.ckpt")
        found = restore_patterns(deployed, tmp_path / "end.ckpt")
        tokens = next(iter(batches()))
        with torch.no_grad():
            assert torch.equal(deployed.eval().model(tokens).logits, again.eval().model(tokens).logits)
        assert all(torch.equal(found[layer].keep, pattern.keep) for layer, pattern in resumed.pruner.patterns.items())


CONFIG = {
    "trainer": {
        "max_steps": 9,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "callbacks": [
            {
                "class_path": "sparse_prune.callbacks.AttentionPruning",
                "init_args": {
                    "sparsity": {
                        "class_path": "sparse_prune.CubicSchedule",
                        "init_args": {"final": 0.4, "end_step": 6},
                    },
                    "block_size": BLOCK,
                    "every_n_steps": 1,
                    "min_delta": 0.5,
                    "patience": 2,
                },
            }
        ],
    }
}


@pytest.mark.parametrize("given", ["arguments", "list"])
def test_the_command_line_takes_class_paths(name, given, tmp_path):
    config = copy.deepcopy(CONFIG)
    ours = {
        "swap": {"class_path": "sparse_prune.callbacks.KernelSwap", "init_args": {"backend": "gather"}},
        "logging": {"class_path": "sparse_prune.callbacks.SparsityLogger", "init_args": {"images": False}},
    }
    if given == "arguments":
        config["trainer"]["callbacks"][0]["init_args"] |= ours
    else:
        config["trainer"]["callbacks"] = [*ours.values(), *config["trainer"]["callbacks"]]
    config["trainer"]["default_root_dir"] = str(tmp_path)
    config["trainer"]["logger"] = [
        {
            "class_path": f"{name}.loggers.CSVLogger",
            "init_args": {"save_dir": str(tmp_path), "name": "", "version": ""},
        },
        {
            "class_path": "sparse_prune.callbacks.FallbackWandbLogger",
            "init_args": {"project": "test", "save_dir": str(tmp_path), "offline": True},
        },
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = import_module(f"{name}.cli").LightningCLI
    args = ["fit", "--config", str(tmp_path / "config.yaml")]
    made = cli(MODULES[name], DATA[name], args=args, save_config_callback=None)
    callback = next(found for found in made.trainer.callbacks if isinstance(found, AttentionPruning))
    assert {event.backend for event in callback.swap.events} == {"gather"}
    assert not callback.logging.images
    assert set().union(*read_csv(tmp_path)) >= EXPECTED - {"val/loss"}
    assert isinstance(made.trainer.loggers[1], FallbackWandbLogger)
    made.trainer.loggers[1].experiment.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_pictures_reach_the_loggers_of_either_package(name, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = import_module(f"{name}.loggers").TensorBoardLogger(tmp_path, name="", version="")
    callback = pruning(swap=KernelSwap("gather"))
    trainer(tmp_path, [callback], package=import_module(name), logger=logger).fit(MODULES[name](), batches())
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "patterns/atlas" in events.Tags()["images"]


def test_copies_of_the_process_and_hooks_are_told_in_either_package(name, tmp_path):
    callback = pruning()
    fit = trainer(tmp_path, [callback], package=import_module(name), strategy="ddp_spawn", devices=2)
    with pytest.raises(ValueError, match="as ddp_spawn, ddp_fork and ddp_notebook do"):
        callback.setup(fit, MODULES[name](), "fit")
    own = type("Own", (MODULES[name],), {"configure_model": lambda self: None})
    assert overrides(own(), "configure_model")
    assert not overrides(own(), "setup")


def test_steps_of_an_accumulation_scheduler_of_either_package(name, tmp_path):
    scheduler = import_module(f"{name}.callbacks").GradientAccumulationScheduler({0: 1, 1: 4})
    callback = AttentionPruning(pruning(final=0.4, end_step=1.0).pruner.schedule, block_size=BLOCK, every_n_steps=1)
    fit = trainer(tmp_path, [callback, scheduler], steps=-1, package=import_module(name), max_epochs=2)
    fit.fit(MODULES[name](), batches(16))
    assert callback.pruner.schedule.end_step == fit.global_step == 8 + 2


def test_pytorch_lightning_alone_is_enough():
    """A process of its own, in which the other package cannot be imported."""
    code = """
import sys
sys.modules["lightning"] = None
import pytorch_lightning as pl
from sparse_prune import ConstantSchedule
from sparse_prune.callbacks import AttentionPruning, FallbackWandbLogger
pl.Trainer(callbacks=[AttentionPruning(ConstantSchedule(final=0.5))], logger=False, accelerator="cpu")
assert not any(name.startswith("lightning.") for name in sys.modules), "imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
