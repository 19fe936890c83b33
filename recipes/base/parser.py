"""The parser of the recipes' command lines: paths of a configuration follow its `default_root_dir`."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.cli import LightningArgumentParser

PLACE = "{default_root_dir}"
"""Stands for `trainer.default_root_dir` in the settings of the Trainer: a logger's `save_dir`, a callback's folder."""


class RecipeParser(LightningArgumentParser):
    """Puts `trainer.default_root_dir` into the place of `{default_root_dir}` when it instantiates.

    What is parsed, printed and saved keeps the placeholder, so that a saved configuration can be moved again.
    """

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """The objects that a parsed configuration describes."""
        placed = cfg.clone()
        settings = placed.get(placed.get("subcommand") or "", placed)
        trainer = settings.get("trainer")
        if trainer is not None:
            settings["trainer"] = _filled(trainer, str(trainer.get("default_root_dir") or "."))
        return super().instantiate_classes(placed, **options)


def _filled(value: Any, folder: str) -> Any:
    """A copy of settings, however nested, with the folder in its places."""
    if isinstance(value, str):
        return value.replace(PLACE, folder)
    if isinstance(value, list):
        return [_filled(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, folder) for key, item in value.items()}
    if hasattr(value, "clone"):  # jsonargparse's namespaces
        copy = value.clone()
        for key, item in vars(value).items():
            copy[key] = _filled(item, folder)
        return copy
    return value
