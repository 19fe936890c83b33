"""The command line: ListOps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from sparse_prune.recipes.base.cli import FineTuneCLI, run
from sparse_prune.recipes.long_range.data import ListOpsDataModule
from sparse_prune.recipes.long_range.module import ListOpsModule


class ListOpsCLI(FineTuneCLI):
    """Takes the length from the data; reports the share of the commonest class, the accuracy of guessing it always."""

    exportable = False

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.length", "model.length", apply_on="instantiate")

    @override
    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = Counter(int(example["labels"]) for example in self.datamodule.examples["test"])
        model, rules = config["model"], self.datamodule.rules
        return {
            "data": config["data"]["data"],
            "lengths": f"{rules.min_length} to {rules.max_length} tokens",
            "training expressions": len(self.datamodule.examples["train"]),
            "layers, heads, width": f"{model['layers']}, {model['heads']}, {model['width']}",
            "commonest class of the test": f"{max(values.values()) / values.total():.1%}",
        }


def main(args: list[str] | None = None) -> None:
    """Run the command line; `--config NAME` finds the shipped configurations by name."""
    run(ListOpsCLI, ListOpsModule, ListOpsDataModule, __package__, args)
