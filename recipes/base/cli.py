"""The command line of a recipe: a fine-tune with pruning, its dense twin, and the report."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from typing_extensions import override

from sparse_prune.callbacks import AttentionPruning
from sparse_prune.callbacks.run_folder import filled_folders, run_folder
from sparse_prune.distributed import on_first_rank
from sparse_prune.export import check_folder, save_pretrained
from sparse_prune.files import user_path
from sparse_prune.machine import describe_machine
from sparse_prune.metrics import STEP_SECONDS, savings
from sparse_prune.recipes.base.closing import where_and_next, won_and_lost
from sparse_prune.recipes.base.history import RunHistory
from sparse_prune.recipes.base.module import FineTuneModule
from sparse_prune.recipes.base.parser import RecipeParser, end_with
from sparse_prune.recipes.base.pretrained import check_vocabulary
from sparse_prune.recipes.base.progress import Heartbeat, Progress
from sparse_prune.recipes.base.report import CacheComparison, DenseRun, RunReport
from sparse_prune.recipes.base.trainer import RecipeTrainer
from sparse_prune.recipes.base.twin import TwinLogger
from sparse_prune.refusals import refusals
from sparse_prune.sharded import is_sharded

log = logging.getLogger(__name__)
_Found = TypeVar("_Found")
_CONFIG = ("--config", "-c")
_EXPORT = "pruned"
_DEBUG = "--debug"
_SHIPPED = "sparse_prune.recipes."


class FineTuneCLI(LightningCLI):
    """The command line of a recipe: `fit` ends with a report; `--compare_dense true` repeats the run without pruning.

    The module is a `FineTuneModule` whose test step logs `test/loss` and the other metrics that the report compares.
    Its hyperparameters must suffice to build it anew.
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
                "--export",
                type=bool | str | None,
                default=None,
                help="Folder to export the pruned model to, to load again; true: `pruned` in the run's own folder.",
            )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with warnings.catch_warnings():
            # The arguments are given on purpose: `run` replaces names by paths.
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        # Before AttentionPruning, so that what it asks after the first step is no part of the step.
        trainer.callbacks.insert(0, Progress(self._get(self.config, "compare_dense")))  # type: ignore[attr-defined]
        return trainer

    def tokenizer(self) -> Any:
        """Return the tokenizer for an export; None without one."""
        return None

    def quality(self, trainer: pl.Trainer) -> dict[str, float]:
        """Measure other qualities than the test metrics on a model that was just trained: name -> share in [0, 1]."""
        return {}

    def cache(self) -> CacheComparison | None:
        """Measure the KV cache with and without patterns, on rank 0 alone; None for models without one."""
        return None

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Describe model and data for the report, from the configuration of `fit`."""
        return {}

    def held_out(self) -> dict[str, Any] | None:
        """Describe the held-out data for an export, as JSON types; None if there is nothing to tell."""
        return None

    def next_commands(self, folder: Path, export: str | None) -> list[list[str]]:
        """Return the commands to suggest at the end, as arguments of `sparse-prune`."""
        return [["report", str(folder)]]

    def before_fit(self) -> None:
        """Refuse settings that would fail after the training, and seed the run as the dense twin is seeded."""
        # On every rank alone, as there is no process group yet.
        for kind in (RunHistory, AttentionPruning):
            _callback(self.trainer, kind)
        if isinstance(self._export, str):
            self._check_export(self._export)
        tokenizer = self.tokenizer()
        if tokenizer is not None:
            check_vocabulary(tokenizer, self.model.model)
        self._seed()

    def _check_export(self, folder: str) -> None:
        check_folder(folder, "export")
        for filled in filled_folders(self.trainer):
            if filled.resolve().is_relative_to(user_path(folder).resolve()):
                raise ValueError(
                    f"`export` must be a folder without the run's own files, got {folder!r}, but logs or checkpoints "
                    f"go to {str(filled)!r}. Name another, such as {str(filled / _EXPORT)!r}."
                )

    @property
    def _export(self) -> str | bool | None:
        return (self.config["fit"]["export"] or None) if self.exportable else None

    def _seed(self) -> None:
        pl.seed_everything(int(self.config["fit"]["seed_everything"] or 0), verbose=False)

    def after_fit(self) -> None:
        """Export, test, repeat the run without pruning if asked, and write the report: every rank takes part."""
        if self.trainer.interrupted:
            return
        folder = run_folder(self.trainer)
        export = str(folder / _EXPORT) if self._export is True else self._export or None
        if export is not None:
            self._save_pretrained(export)
        report = self._report()
        if self.config["fit"]["compare_dense"]:
            on_first_rank(partial(report.write, folder))  # in case the dense run ends the process
            report = replace(report, dense=self._compare(folder))
        path = on_first_rank(partial(report.write, folder))
        if self.trainer.is_global_zero:
            places = where_and_next(path, folder, export, self.next_commands(folder, export))
            print("\n".join(["", *report.verdicts(), "", *won_and_lost(report), "", *places]))

    def _save_pretrained(self, folder: str) -> None:
        model, pruner = self.model.model, _callback(self.trainer, AttentionPruning).pruner
        described = self.describe(self.config["fit"])
        base_model, data = _told(described.get("model")), _told(described.get("data", described.get("text")))
        told = {"tokenizer": self.tokenizer(), "base_model": base_model, "data": data}
        told["held_out"] = self.held_out()
        export = partial(save_pretrained, model, folder, pruner=pruner, **told)
        if is_sharded(model):
            export()
        else:
            on_first_rank(export)

    def _report(self) -> RunReport:
        """Make the report of the run without its dense twin."""
        pruner = _callback(self.trainer, AttentionPruning).pruner
        loss, quality = self._test(self.trainer, self.model)
        return RunReport(
            setup=self.describe(self.config["fit"]) | self._setup(),
            loss=loss,
            quality=quality,
            records=_callback(self.trainer, RunHistory).records,
            cache=self._cache(),
            layers=list(pruner.layers),
            sparsity=pruner.total_sparsity,
            events=_callback(self.trainer, AttentionPruning).swap.events,
            patterns=pruner.patterns,
            savings=savings(pruner),
            notes=self._notes(),
        )

    def _cache(self) -> CacheComparison | None:
        with Heartbeat("the KV cache"):
            return None if self._in_parts else on_first_rank(partial(_attempt, "the KV cache", self.cache))

    @property
    def _in_parts(self) -> bool:
        """Whether the model is sharded over processes."""
        return self.trainer.world_size > 1 and is_sharded(self.model.model)

    def _notes(self) -> list[str]:
        if self.trainer.world_size == 1:
            return []
        notes = [f"{self.trainer.world_size} processes: step times and training losses are those of the first."]
        if self._in_parts:
            notes.append(
                "The KV cache and decoding were not measured, because FSDP2 shards the model: "
                "`sparse-prune evaluate` measures an export."
            )
        return notes

    def _test(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[float, dict[str, float]]:
        """Measure the test loss and the other qualities of a model."""
        quality = self.quality(trainer)  # first: testing empties the metrics of the fit
        found = trainer.test(module, datamodule=self.datamodule, verbose=False)[0]
        tested = {name.removeprefix("test/").replace("_", " "): float(value) for name, value in found.items()}
        return tested.pop("loss"), tested | quality

    def _compare(self, folder: Path) -> DenseRun | None:
        """Repeat the run without pruning; None if it fails in a single process.

        With several processes its error ends the run, as the other ranks would wait for the one that failed.
        """
        dense_run = partial(self._dense_run, folder)
        return _attempt("the dense run", dense_run) if self.trainer.world_size == 1 else dense_run()

    def _dense_run(self, folder: Path) -> DenseRun:
        self._seed()
        module, history, beside = self._twin(), RunHistory(), TwinLogger(self.trainer.loggers)
        trainer = self._twin_trainer(
            callbacks=[history, Progress()], logger=[CSVLogger(folder, name="dense", version=""), beside]
        )
        before, _ = self._test(trainer, module)
        self._seed()
        trainer.fit(module, datamodule=self.datamodule)
        after, quality = self._test(trainer, module)
        for record in history.records:
            beside.log_metrics({STEP_SECONDS.key: record.seconds}, step=record.step - 1)
        beside.save()
        return DenseRun(before, after, history.records, quality)

    def _twin(self) -> FineTuneModule:
        """Make a new module, with the optimizer and the scheduler of the command line if it names any."""
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
        """Make a new Trainer with the same settings. Strategy and plugins are made anew, because they keep state."""
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
            **self._processes(),
            **describe_machine(),
        }

    def _processes(self) -> dict[str, Any]:
        """Describe how several processes share a batch."""
        if self.trainer.world_size == 1:
            return {}
        shares = (self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        batch, accumulated = self.datamodule.batch_size, self.trainer.accumulate_grad_batches
        return {
            "processes": self.trainer.world_size,
            "effective batch": f"{shares * batch * accumulated} examples per optimizer step "
            f"({shares} shares, batch_size {batch}, accumulate_grad_batches {accumulated})",
        }


def run(
    cli: type[FineTuneCLI],
    module: type[FineTuneModule],
    data: type[pl.LightningDataModule],
    package: str,
    args: list[str] | None = None,
) -> None:
    """Run a recipe's command line; `--config NAME` finds the configurations in its package by name.

    Any refusal, of settings, files or weights, ends the process with one line and exit status 2; with `--debug`, with
    the traceback.
    """
    given, program = list(sys.argv[1:] if args is None else args), _program(package)

    def refuse(text: str) -> None:
        end_with(program, f"{text.rstrip('. ')}. {_DEBUG} shows where it came from.")

    logging.basicConfig(format="%(message)s")
    logging.getLogger("sparse_prune").setLevel(logging.INFO)
    with nullcontext() if _DEBUG in given else refusals(refuse, MisconfigurationException, TypeError):
        given = _find_configs([arg for arg in given if arg != _DEBUG], package)
        prog = {"prog": program}
        kinds: dict[str, Any] = {"trainer_class": RecipeTrainer, "parser_class": RecipeParser}
        kinds["parser_kwargs"] = prog | {name: prog for name in cli.subcommands()}
        cli(module, data, args=given, save_config_kwargs={"overwrite": True}, **kinds)


def _program(package: str) -> str:
    """Return the command that runs a recipe."""
    name = package.removeprefix(_SHIPPED)
    return f"python -m {package} fit" if name == package else f"sparse-prune recipes run {name}"


def _find_configs(args: Sequence[str], package: str) -> list[str]:
    """Replace the names of shipped configurations in the command line by their paths."""
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
    shipped = {Path(str(file)).stem: str(file) for file in files(package).iterdir() if file.name.endswith(".yaml")}
    path = user_path(name)
    if path.exists() and not path.is_dir():
        return str(path)
    if name not in shipped:
        raise ValueError(f"`--config` must be a file or one of {', '.join(sorted(shipped))}, got {name!r}.")
    return shipped[name]


def _attempt(what: str, measure: Callable[[], _Found]) -> _Found | None:
    """Measure, or log the error and return None, so that the rest of the report is not lost."""
    try:
        return measure()
    except Exception:
        log.exception("The report lacks %s, because measuring it failed.", what)
        return None


def _told(value: object) -> str | None:
    """Return a setting as the model card shows it: of a path on this machine, the last part alone."""
    if value is None:
        return None
    path = user_path(str(value))
    return path.name if path.exists() else str(value)


def _callback(trainer: pl.Trainer, kind: type[Any]) -> Any:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"`trainer.callbacks` must hold a {kind.__name__} for the report. Add it to the config.")
