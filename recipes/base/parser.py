"""The parser of the recipes' command lines, with one-line errors and paths that follow `default_root_dir`."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from pytorch_lightning.cli import LightningArgumentParser

PLACE = "{default_root_dir}"
"""Placeholder for `trainer.default_root_dir` in the Trainer's settings, such as a logger's `save_dir`."""


class RecipeParser(LightningArgumentParser):
    """Replaces `{default_root_dir}` by `trainer.default_root_dir` when it instantiates.

    Parsed, printed and saved configurations keep the placeholder, so that they can be moved.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the process with one line instead of the usage of 500 settings."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.partition(" [options]")[0]  # jsonargparse adds that, and the subcommand
        end_with(program, f"{_readable(message)}{_likely(message, parser)} {program} --help shows the settings.")

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """Instantiate the objects of a parsed configuration."""
        placed = cfg.clone()
        settings = placed.get(placed.get("subcommand") or "", placed)
        trainer = settings.get("trainer")
        if trainer is not None:
            settings["trainer"] = _filled(trainer, str(trainer.get("default_root_dir") or "."))
        return super().instantiate_classes(placed, **options)


def end_with(program: str, text: str) -> NoReturn:
    """End the process with one line on stderr and exit status 2."""
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)


def _readable(message: str) -> str:
    """Shorten a message of jsonargparse, which repeats types and values."""
    lines = [line.strip() for line in message.splitlines()]
    told = " ".join(line for line in lines if not line.startswith(("Subtypes:", "Given value", "- Expected a")))
    told = re.sub(r'Parser key "([^"]+)":', r"`\1`:", told)
    return re.sub(r"<class '([^']+)'>", r"\1", told).replace("Expected a int", "Expected an int").rstrip(".")


def _likely(message: str, parser: LightningArgumentParser) -> str:
    """Suggest a setting whose name is close to an unknown one."""
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    close = get_close_matches(unknown[1], parser._option_string_actions, 1) if unknown else []
    return f". Did you mean {close[0]}?" if close else "."


def _filled(value: Any, folder: str) -> Any:
    """Copy nested settings with placeholders replaced by the folder."""
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
