"""The command line: image classification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from sparse_prune.recipes.base.cli import FineTuneCLI, run
from sparse_prune.recipes.vision.data import ImageDataModule
from sparse_prune.recipes.vision.module import VisionModule


class VisionCLI(FineTuneCLI):
    """Takes classes and size from the data."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size")

    @override
    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        vit = self.model.model.config
        return {
            "model": config["model"]["model"] or "ViT from scratch",
            "data": config["data"]["data"],
            "image and patch size": f"{vit.image_size}, {vit.patch_size}",
            "layers, heads, width": f"{vit.num_hidden_layers}, {vit.num_attention_heads}, {vit.hidden_size}",
        }


def main(args: list[str] | None = None) -> None:
    """Run the command line; `--config NAME` finds the shipped configurations by name."""
    run(VisionCLI, VisionModule, ImageDataModule, __package__, args)
