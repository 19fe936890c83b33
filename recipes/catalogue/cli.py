"""The command line: list, copy, run."""

from __future__ import annotations

import argparse
from importlib import import_module

from sparse_prune.recipes.catalogue.shelf import copy, recipes
from sparse_prune.recipes.user_path import user_path


def main(args: list[str] | None = None) -> None:
    """`sparse-prune recipes [list | copy NAME FOLDER | run NAME ...]`."""
    known = recipes()
    parser = argparse.ArgumentParser(prog="sparse-prune recipes", description="List, copy and run recipes.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every recipe with its configurations (the default)")
    copying = actions.add_parser("copy", help="copy code and configurations for editing")
    copying.add_argument("name", choices=known)
    copying.add_argument("folder", type=user_path, help="new folder; its name becomes the package's")
    running = actions.add_parser("run", help="fit with a configuration")
    running.add_argument("name", choices=known)
    what = "name of a shipped configuration, or a file; may be repeated"
    running.add_argument("-c", "--config", action="append", required=True, help=what)
    given, rest = parser.parse_known_args(args)
    if rest and given.action != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.action == "run":
        configs = [part for config in given.config for part in ("--config", config)]
        import_module(f"{known[given.name].package}.cli").main(["fit", *configs, *rest])
    elif given.action == "copy":
        try:
            written = copy(known[given.name], given.folder)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(f"Copied {len(written)} files. Edit them, then, in {given.folder.resolve().parent}:")
        print(f"  python -m {given.folder.name} fit --config quickstart")
    else:
        for recipe in known.values():
            print(f"{recipe.name}\n  {recipe.description}\n  configurations: {', '.join(recipe.configs)}")
        print("\nsparse-prune recipes run NAME --config CONFIGURATION; any setting: --trainer.max_steps 50 ...")
