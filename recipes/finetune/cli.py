"""The command line of a recipe: a fine-tune with pruning, its dense twin, and the report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from sparse_prune.callbacks.run_folder import run_folder
from sparse_prune.callbacks.sparsity_logger import savings_metrics
from sparse_prune.recipes.finetune.history import RunHistory
from sparse_prune.recipes.finetune.machine import describe_machine
from sparse_prune.recipes.finetune.module import FineTuneModule
from sparse_prune.recipes.finetune.report import CacheComparison, DenseRun, RunReport
from typing_extensions import override

from sparse_prune.export import save_pretrained

log = logging.getLogger(__name__)


class FineTuneCLI(LightningCLI):
    """`fit` ends with a report; with `--compare_dense true` it repeats the run without pruning.

    The module is a `FineTuneModule` whose test step logs `test/loss` and whatever else the report shall compare. Its
    hyperparameters are all it takes to build it anew.
    """

    exportable = True
    """Whether the model is of transformers, so that `--export` can save it."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--compare_dense", type=bool, default=False, help="Repeat the run without pruning and compare."
        )
        if self.exportable:
            parser.add_argument(
                "--export", type=str | None, default=None, help="Folder to export the pruned model to, to load again."
            )

    def tokenizer(self) -> Any:
        """What an export shall hold beside the model; None if nothing."""
        return None

    def quality(self, trainer: pl.Trainer) -> dict[str, float]:
        """More than the test metrics say of a model that was just trained: name -> share in [0, 1]."""
        return {}

    def cache(self) -> CacheComparison | None:
        """KV cache with and without patterns, for models that have one."""
        return None

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the report says of model and data, from the configuration of `fit`."""
        return {}

    def before_fit(self) -> None:
        """The run and its dense twin start with the same random numbers, whatever was drawn before."""
        self._seed()

    def _seed(self) -> None:
        pl.seed_everything(int(self.config["fit"]["seed_everything"] or 0), verbose=False)

    def after_fit(self) -> None:
        """Test, repeat the run without pruning if asked, and write the report."""
        if not self.trainer.is_global_zero or self.trainer.interrupted:
            return
        if self.trainer.world_size > 1:
            log.warning("The report is written by runs of one process; this one has %d.", self.trainer.world_size)
            return
        folder = run_folder(self.trainer)
        config = self.config["fit"]
        pruner = _callback(self.trainer, AttentionPruning).pruner
        if self.exportable and config["export"]:
            save_pretrained(self.model.model, config["export"], pruner=pruner, tokenizer=self.tokenizer())
        loss, quality = self._test(self.trainer, self.model)
        report = RunReport(
            setup=self.describe(config) | self._setup(),
            loss=loss,
            quality=quality,
            records=_callback(self.trainer, RunHistory).records,
            cache=self.cache(),
            dense=self._dense_run(folder) if config["compare_dense"] else None,
            layers=list(pruner.layers),
            sparsity=pruner.total_sparsity,
            events=_callback(self.trainer, KernelSwap).events,
            patterns=pruner.patterns,
            savings=savings_metrics(pruner),
        )
        path = report.write(folder)
        print("\n".join(["", *report.verdicts(), f"Report: {path}"]))

    def _test(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[float, dict[str, float]]:
        """Loss, and all else that tells how good a model is."""
        quality = self.quality(trainer)  # first: testing empties the metrics of the fit
        found = trainer.test(module, datamodule=self.datamodule, verbose=False)[0]
        tested = {name.removeprefix("test/").replace("_", " "): float(value) for name, value in found.items()}
        return tested.pop("loss"), tested | quality

    def _dense_run(self, folder: Path) -> DenseRun:
        self._seed()
        # The command line adds entries of its own to the hyperparameters.
        given = {name: value for name, value in self.model.hparams.items() if not name.startswith("_")}
        module = type(self.model)(**given)
        settings: dict[str, Any] = {
            "max_steps": self.trainer.max_steps,
            "max_epochs": self.trainer.max_epochs,
            "precision": self.trainer.precision,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "limit_val_batches": self.trainer.limit_val_batches,
            "val_check_interval": self.trainer.val_check_interval,
            "check_val_every_n_epoch": self.trainer.check_val_every_n_epoch,
            "num_sanity_val_steps": 0,
            "accelerator": self.config["fit"]["trainer"]["accelerator"],
            "devices": 1,
        }
        history = RunHistory()
        logger = CSVLogger(folder, name="dense", version="")
        trainer = pl.Trainer(
            **settings, callbacks=[history], logger=logger, enable_checkpointing=False, log_every_n_steps=1
        )
        before, _ = self._test(trainer, module)
        self._seed()
        trainer.fit(module, datamodule=self.datamodule)
        after, quality = self._test(trainer, module)
        for own in self.trainer.loggers:  # beside the pruned run's loss, in the same chart
            for record in history.records:
                own.log_metrics({"dense/train_loss": record.loss}, step=record.step - 1)
            own.save()
        return DenseRun(before, after, history.records, quality)

    def _setup(self) -> dict[str, Any]:
        return {
            "optimizer steps": self.trainer.global_step,
            "trained parameters": self.model.hparams.get("train_only") or "all",
            "precision": self.trainer.precision,
            "block size": _callback(self.trainer, AttentionPruning).pruner.block_size,
            **describe_machine(),
        }


def run(
    cli: type[FineTuneCLI],
    module: type[FineTuneModule],
    data: type[pl.LightningDataModule],
    package: str,
    args: list[str] | None = None,
) -> None:
    """Run a recipe's command line; `--config NAME` finds the configurations in its package by name.

    Args:
        cli: Kind of command line.
        module: What is trained.
        data: On what.
        package: Where the recipe's configurations lie, as its `__package__` says.
        args: Command line; None takes that of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    for index, (flag, name) in enumerate(zip(given, given[1:], strict=False), start=1):
        shipped = files(package) / f"{name}.yaml"
        if flag == "--config" and not Path(name).exists() and shipped.is_file():
            given[index] = str(shipped)
    logging.getLogger("sparse_prune").setLevel(logging.INFO)
    cli(module, data, args=given, save_config_kwargs={"overwrite": True})


def _callback(trainer: pl.Trainer, kind: type[Any]) -> Any:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"`trainer.callbacks` must hold a {kind.__name__} for the report. Add it to the config.")
