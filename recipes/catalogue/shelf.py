"""The recipes that are there, and copies of them."""

from __future__ import annotations

import ast
import keyword
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sparse_prune.export.folder import whole_folder

_PACKAGE = "sparse_prune.recipes"


@dataclass(frozen=True)
class Recipe:
    """A package with a command line and configurations."""

    name: str
    folder: Path
    description: str
    """First line of the package's docstring."""
    configs: tuple[str, ...]

    @property
    def package(self) -> str:
        """What `python -m` runs."""
        return f"{_PACKAGE}.{self.name}"


def recipes() -> dict[str, Recipe]:
    """Name -> recipe."""
    found = {}
    for folder in sorted(Path(str(files(_PACKAGE))).iterdir()):
        configs = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
        if configs and (folder / "cli.py").is_file():
            docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            found[folder.name] = Recipe(folder.name, folder, docstring.partition("\n")[0], configs)
    return found


def copy(recipe: Recipe, target: Path) -> list[Path]:
    """Copy code and configurations into a new folder, a package of that name that imports its own modules.

    Args:
        recipe: What to copy.
        target: The new folder; its name is the new package's.

    Returns:
        The files written.

    Raises:
        FileExistsError: If the folder is there already.
        ValueError: If its name cannot be a package's.
    """
    name = target.name
    if not name.isidentifier() or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise ValueError(
            f"`folder` must end in a name that Python can import and does not use itself, got {name!r}. Try my_recipe."
        )
    if target.exists():
        raise FileExistsError(f"`folder` must not exist yet, got {str(target)!r}. Name another, or remove it.")
    sources = sorted([*recipe.folder.glob("*.py"), *recipe.folder.glob("*.yaml")])
    with whole_folder(target) as folder:
        for source in sources:
            text = source.read_text(encoding="utf-8").replace(recipe.package, target.name)
            (folder / source.name).write_text(text, encoding="utf-8")
    return [target / source.name for source in sources]
