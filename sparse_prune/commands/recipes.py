"""`sparse-prune recipes`: lists the recipes, copies one for editing, and runs one."""

from __future__ import annotations

import argparse
import ast
import keyword
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from sparse_prune.files import user_path, whole_folder
from sparse_prune.refusals import refusals

_PACKAGE = "sparse_prune.recipes"


@dataclass(frozen=True)
class Recipe:
    """A package with a command line and configurations."""

    name: str
    folder: Path
    description: str
    """The first line of the package's docstring."""
    configs: tuple[str, ...]

    @property
    def package(self) -> str:
        """The package's name, for `python -m`."""
        return f"{_PACKAGE}.{self.name}"


def recipes() -> dict[str, Recipe]:
    """Return name -> recipe."""
    found = {}
    for folder in sorted(Path(str(files(_PACKAGE))).iterdir()):
        configs = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
        if configs and (folder / "cli.py").is_file():
            docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            found[folder.name] = Recipe(folder.name, folder, docstring.partition("\n")[0], configs)
    return found


def copy(recipe: Recipe, target: Path) -> list[Path]:
    """Copy a recipe's code and configurations into a new folder, as a package that imports its own modules.

    Returns:
        The files that were written.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If its name cannot be a package's.
    """
    name = target.name
    if not name.isidentifier() or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise ValueError(
            f"`folder` must end in an importable name that is not of the standard library, got {name!r}. Try my_recipe."
        )
    if target.exists():
        raise FileExistsError(f"`folder` must not exist yet, got {str(target)!r}. Name another, or remove it.")
    sources = sorted([*recipe.folder.glob("*.py"), *recipe.folder.glob("*.yaml")])
    with whole_folder(target) as folder:
        for source in sources:
            text = source.read_text(encoding="utf-8").replace(recipe.package, target.name)
            (folder / source.name).write_text(text, encoding="utf-8")
    return [target / source.name for source in sources]


def main(args: list[str] | None = None) -> None:
    """Run `sparse-prune recipes [list | copy NAME FOLDER | run NAME ...]`."""
    known = recipes()
    parser = argparse.ArgumentParser(prog="sparse-prune recipes", description="List, copy and run recipes.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every recipe with its configurations (the default)")
    copying = actions.add_parser("copy", help="copy code and configurations for editing")
    copying.add_argument("name", choices=known)
    copying.add_argument("folder", type=user_path, help="new folder; its name becomes the package's")
    running = actions.add_parser("run", help="fit with a configuration", add_help=False)
    running.add_argument("name", choices=known, nargs="?")
    what = "name of a shipped configuration, or a file; may be repeated"
    running.add_argument("-c", "--config", action="append", default=[], help=what)
    running.add_argument("-h", "--help", action="store_true", help="after NAME: every setting of that recipe")
    running.add_argument("--debug", action="store_true", help="show where an error came from")
    given, rest = parser.parse_known_args(args)
    if rest and given.action != "run":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.action == "run":
        _run(running, known, given, rest)
    elif given.action == "copy":
        with refusals(parser.error):
            written = copy(known[given.name], given.folder)
        print(f"Copied {len(written)} files. Edit them, then, in {given.folder.resolve().parent}:")
        print(f"  python -m {given.folder.name} fit --config quickstart")
    else:
        for recipe in known.values():
            print(f"{recipe.name}\n  {recipe.description}\n  configurations: {', '.join(recipe.configs)}")
        print("\nsparse-prune recipes run NAME --config CONFIGURATION; any setting: --trainer.max_steps 50 ...")


def _run(parser: argparse.ArgumentParser, known: dict[str, Recipe], given: argparse.Namespace, rest: list[str]) -> None:
    if given.name is None and given.help:
        parser.print_help()
        return
    if given.name is None:
        parser.error(f"NAME must be one of {', '.join(known)}")
    recipe = known[given.name]
    if not given.config and not given.help:
        parser.error(f"--config must be a file or one of {', '.join(recipe.configs)}")
    flags = [f"--{name}" for name in ("help", "debug") if getattr(given, name)]
    configs = [part for config in given.config for part in ("--config", config)]
    import_module(f"{recipe.package}.cli").main(["fit", *configs, *rest, *flags])
