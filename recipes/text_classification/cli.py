"""The command line: text classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from sparse_prune.recipes.base.cli import FineTuneCLI, run
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.text_classification.data import LabelledTextDataModule
from sparse_prune.recipes.text_classification.module import TextClassificationModule


class TextClassificationCLI(FineTuneCLI):
    """Takes the tokenizer from the model and the classes from the data."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.model", "data.tokenizer")
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")

    @override
    def tokenizer(self) -> Any:
        return load_tokenizer(self.config["fit"]["model"]["model"], padding=True)

    @override
    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        data = config["data"]
        return {
            "model": config["model"]["model"],
            "data": data["data"],
            "classes": ", ".join(self.datamodule.classes),
            "length": data["max_length"],
        }


def main(args: list[str] | None = None) -> None:
    """Run the command line; `--config NAME` finds the shipped configurations by name."""
    run(TextClassificationCLI, TextClassificationModule, LabelledTextDataModule, __package__, args)
