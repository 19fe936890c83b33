"""The command line of a recipe: a fine-tune with pruning, its dense twin, and the report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from sparse_prune.callbacks.pruning_metrics import savings_metrics
from sparse_prune.callbacks.run_folder import run_folder
from sparse_prune.recipes.finetune.history import RunHistory
from sparse_prune.recipes.finetune.machine import describe_machine
from sparse_prune.recipes.finetune.module import FineTuneModule
from sparse_prune.recipes.finetune.report import CacheComparison, DenseRun, RunReport
from typing_extensions import override

from sparse_prune.export import check_folder, save_pretrained

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_CONFIG = ("--config", "-c")


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
        """Refuse what could only fail after the training. Start with the random numbers that the dense twin gets."""
        if self.trainer.world_size == 1:
            # AttentionPruning adds a KernelSwap where there is none.
            for kind in (RunHistory, AttentionPruning):
                _callback(self.trainer, kind)
            if self._export_folder is not None:
                check_folder(self._export_folder, "export")
        self._seed()

    @property
    def _export_folder(self) -> str | None:
        return (self.config["fit"]["export"] or None) if self.exportable else None

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
        if self._export_folder is not None:
            save_pretrained(self.model.model, self._export_folder, pruner=pruner, tokenizer=self.tokenizer())
        loss, quality = self._test(self.trainer, self.model)
        report = RunReport(
            setup=self.describe(config) | self._setup(),
            loss=loss,
            quality=quality,
            records=_callback(self.trainer, RunHistory).records,
            cache=_attempt("the KV cache", self.cache),
            dense=_attempt("the dense run", partial(self._dense_run, folder)) if config["compare_dense"] else None,
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
        module, history = self._twin(), RunHistory()
        trainer = self._twin_trainer(callbacks=[history], logger=CSVLogger(folder, name="dense", version=""))
        before, _ = self._test(trainer, module)
        self._seed()
        trainer.fit(module, datamodule=self.datamodule)
        after, quality = self._test(trainer, module)
        for own in self.trainer.loggers:  # beside the pruned run's loss, in the same chart
            for record in history.records:
                own.log_metrics({"dense/train_loss": record.loss}, step=record.step - 1)
            own.save()
        return DenseRun(before, after, history.records, quality)

    def _twin(self) -> FineTuneModule:
        """The module anew, with the optimizer and the scheduler of the command line if it names any."""
        # The command line adds entries of its own to the hyperparameters.
        given = {name: value for name, value in self.model.hparams.items() if not name.startswith("_")}
        twin: FineTuneModule = type(self.model)(**given)
        trained, self.model = self.model, twin
        try:
            self._add_configure_optimizers_method_to_model(self.subcommand)
        finally:
            self.model = trained
        return twin

    def _twin_trainer(self, **replaced: Any) -> pl.Trainer:
        """A Trainer of the same settings. Strategy, plugins and the like are made anew: they keep state."""
        settings = self.config["fit"]["trainer"].as_dict()
        settings |= {"callbacks": None, "logger": None, "enable_checkpointing": False}
        parser = LightningArgumentParser()
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        made = parser.instantiate_classes(parser.parse_object({"trainer": settings})).trainer
        return self.trainer_class(**{**made, **replaced})

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
    given = _find_configs(sys.argv[1:] if args is None else args, package)
    logging.getLogger("sparse_prune").setLevel(logging.INFO)
    cli(module, data, args=given, save_config_kwargs={"overwrite": True})


def _find_configs(args: Sequence[str], package: str) -> list[str]:
    """The command line with paths in the place of the names of shipped configurations."""
    found: list[str] = []
    for arg in args:
        flag, equals, name = arg.partition("=")
        if equals and flag in _CONFIG:
            found.append(f"{flag}={_find_config(name, package)}")
        elif found and found[-1] in _CONFIG:
            found.append(_find_config(arg, package))
        else:
            found.append(arg)
    return found


def _find_config(name: str, package: str) -> str:
    shipped = files(package) / f"{name}.yaml"
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


def _attempt(what: str, measure: Callable[[], _Found]) -> _Found | None:
    """None if it fails, with the error in the log: after the training, the rest of the report shall not be lost."""
    try:
        return measure()
    except Exception:
        log.exception("The report goes without %s, because measuring it failed.", what)
        return None


def _callback(trainer: pl.Trainer, kind: type[Any]) -> Any:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"`trainer.callbacks` must hold a {kind.__name__} for the report. Add it to the config.")
