"""The command line: next-token prediction, with the KV cache in the report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from sparse_prune.evaluation import all_connections, cache_cost, fresh_cache
from sparse_prune.recipes.base.cli import FineTuneCLI, run
from sparse_prune.recipes.base.pretrained import load_tokenizer, longest_prompt
from sparse_prune.recipes.base.report import CacheComparison
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.documents import STDLIB
from sparse_prune.recipes.causal_lm.module import CausalLMModule
from sparse_prune.recipes.causal_lm.trained_text import describe_split

_DECODED = 16  # tokens whose time is taken


class CausalLMCLI(FineTuneCLI):
    """Adds passkey accuracy and the cost of generation."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("data.pack", "model.packed")

    @override
    def tokenizer(self) -> Any:
        return load_tokenizer(self.config["fit"]["model"]["model"])

    @override
    def before_fit(self) -> None:
        super().before_fit()
        self.model.check_passkeys(self.datamodule.context_length)

    @override
    def quality(self, trainer: pl.Trainer) -> dict[str, float]:
        found = trainer.callback_metrics.get("val/passkey_accuracy")
        return {} if found is None else {"passkey accuracy": float(found)}

    @override
    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        data = config["data"]
        told = {"model": config["model"]["model"], "text": data["text"], "context length": data["context_length"]}
        return told | {"documents": "packed"} if data["pack"] else told

    @override
    def held_out(self) -> dict[str, Any]:
        data = self.datamodule
        return describe_split(data.text, data.held_out_share, data.seed)

    @override
    def next_commands(self, folder: Path, export: str | None) -> list[list[str]]:
        data = self.datamodule
        text = [] if data.text == STDLIB else ["--text", *([data.text] if isinstance(data.text, str) else data.text)]
        evaluate = [["evaluate", export, "--lengths", str(data.context_length), *text]] if export is not None else []
        return [*evaluate, *super().next_commands(folder, export)]

    @override
    def cache(self) -> CacheComparison:
        """Measure the cost of generation after one sequence of the test documents, in the parameters' own dtype.

        Under autocast, transformers' cache holds float32 values and ours the dtype that it gets, so that bytes would
        not compare. If the model has a table of positions, the sequence is cut to leave room for the decoded tokens.
        """
        device, model = self.trainer.strategy.root_device, self.model.model
        training, home = model.training, model.device
        sequence = self.datamodule.sequences["test"][0][: longest_prompt(model, _DECODED)]
        model.to(device).eval()
        try:
            pruned = cache_cost(model, sequence, partial(fresh_cache, model), decode=_DECODED)
            with all_connections(model):
                dense = cache_cost(model, sequence, partial(fresh_cache, model), decode=_DECODED)
        finally:
            model.to(home).train(training)
        return CacheComparison(len(sequence), dense, pruned)


def main(args: list[str] | None = None) -> None:
    """Run the command line; `--config NAME` finds the shipped configurations by name."""
    run(CausalLMCLI, CausalLMModule, TextDataModule, __package__, args)
