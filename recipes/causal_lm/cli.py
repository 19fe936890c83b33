"""The command line: a fine-tune with pruning, its dense twin, and the report."""

from __future__ import annotations

import logging
import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from sparse_prune.callbacks.sparsity_logger import savings_metrics
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.history import RunHistory
from sparse_prune.recipes.causal_lm.module import CausalLMModule
from sparse_prune.recipes.causal_lm.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.report import CacheComparison, DenseRun, RunReport
from typing_extensions import override

from sparse_prune.evaluation import all_connections, cache_cost, fresh_cache
from sparse_prune.export import save_pretrained

log = logging.getLogger(__name__)


class CausalLMCLI(LightningCLI):
    """`fit` ends with a report; with `--compare_dense true` it first repeats the run without pruning."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--compare_dense", type=bool, default=False, help="Repeat the run without pruning and compare."
        )
        parser.add_argument(
            "--export", type=str | None, default=None, help="Folder to export the pruned model to, to be loaded again."
        )
        parser.link_arguments("model.model", "data.tokenizer")

    def after_fit(self) -> None:
        """Test, repeat the run without pruning if asked, and write the report."""
        if not self.trainer.is_global_zero or self.trainer.interrupted:
            return
        if self.trainer.world_size > 1:
            log.warning("The report is written by runs of one process; this one has %d.", self.trainer.world_size)
            return
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if self.config["fit"]["export"]:
            tokenizer = load_tokenizer(self.config["fit"]["model"]["model"])
            pruner = _callback(self.trainer, AttentionPruning).pruner
            save_pretrained(self.model.model, self.config["fit"]["export"], pruner=pruner, tokenizer=tokenizer)
        passkey = _passkey(self.trainer)  # testing empties the metrics
        report = RunReport(
            setup=self._setup(),
            loss=_test(self.trainer, self.model, self.datamodule),
            records=_callback(self.trainer, RunHistory).records,
            passkey=passkey,
            cache=self._cache(),
            dense=self._dense_run(folder) if self.config["fit"]["compare_dense"] else None,
            **self._pruned(),
        )
        path = report.write(folder)
        print("\n".join(["", *report.verdicts(), f"Report: {path}"]))

    def _pruned(self) -> dict[str, Any]:
        pruner = _callback(self.trainer, AttentionPruning).pruner
        return {
            "layers": list(pruner.layers),
            "sparsity": pruner.total_sparsity,
            "events": _callback(self.trainer, KernelSwap).events,
            "patterns": pruner.patterns,
            "savings": savings_metrics(pruner),
        }

    def _cache(self) -> CacheComparison:
        """What generation costs after one sequence of the test documents, in the parameters' own type.

        Under autocast transformers' cache holds values as float32 and ours as they come: bytes would not compare.
        """
        device, model = self.trainer.strategy.root_device, self.model.model
        training, home = model.training, model.device
        sequence = self.datamodule.sequences["test"][0]
        model.to(device).eval()
        try:
            pruned = cache_cost(model, sequence, partial(fresh_cache, model), decode=16)
            with all_connections(model):
                dense = cache_cost(model, sequence, partial(fresh_cache, model), decode=16)
        finally:
            model.to(home).train(training)
        return CacheComparison(len(sequence), dense, pruned)

    def _dense_run(self, folder: Path) -> DenseRun:
        pl.seed_everything(int(self.config["fit"]["seed_everything"] or 0))
        # The command line adds entries of its own to the hyperparameters.
        given = {name: value for name, value in self.model.hparams.items() if not name.startswith("_")}
        module = CausalLMModule(**given)
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
        before = _test(trainer, module, self.datamodule)
        trainer.fit(module, datamodule=self.datamodule)
        passkey = _passkey(trainer)
        return DenseRun(before, _test(trainer, module, self.datamodule), history.records, passkey)

    def _setup(self) -> dict[str, Any]:
        config = self.config["fit"]
        return {
            "model": config["model"]["model"],
            "text": config["data"]["text"],
            "context length": config["data"]["context_length"],
            "optimizer steps": self.trainer.global_step,
            "trained parameters": config["model"]["train_only"] or "all",
            "precision": self.trainer.precision,
            "block size": _callback(self.trainer, AttentionPruning).pruner.block_size,
            **describe_machine(),
        }


def describe_machine() -> dict[str, str]:
    """Processor, threads, GPU and versions: what a measurement must name."""
    names = ("torch", "triton", "pytorch-lightning", "transformers", "sparse_prune")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads{gpu}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in names),
    }


def main(args: list[str] | None = None) -> None:
    """Run the command line; `--config NAME` finds the shipped configurations by name."""
    import sys

    given = list(sys.argv[1:] if args is None else args)
    for index, (flag, name) in enumerate(zip(given, given[1:], strict=False), start=1):
        shipped = files("sparse_prune.recipes.causal_lm") / f"{name}.yaml"
        if flag == "--config" and not Path(name).exists() and shipped.is_file():
            given[index] = str(shipped)
    logging.getLogger("sparse_prune").setLevel(logging.INFO)
    CausalLMCLI(CausalLMModule, TextDataModule, args=given, save_config_kwargs={"overwrite": True})


def _callback(trainer: pl.Trainer, kind: type[Any]) -> Any:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"`trainer.callbacks` must hold a {kind.__name__} for the report. Add it to the config.")


def _test(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> float:
    return float(trainer.test(module, datamodule=data, verbose=False)[0]["test/loss"])


def _passkey(trainer: pl.Trainer) -> float | None:
    found = trainer.callback_metrics.get("val/passkey_accuracy")
    return None if found is None else float(found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
