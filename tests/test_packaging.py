import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"sparse_prune": ROOT / "sparse_prune", "sparse_prune.callbacks": ROOT / "callbacks"}
PACKAGES["sparse_prune.recipes"] = ROOT / "recipes"
ORDER = [
    {"sparse_prune.schedules", "sparse_prune.pattern", "sparse_prune.stability"},
    {"sparse_prune.packing", "sparse_prune.first_rank", "sparse_prune.whole_file"},
    {"sparse_prune.scores", "sparse_prune.ranks", "sparse_prune.selection", "sparse_prune.fixed_patterns"},
    {"sparse_prune.kernels"},
    {"sparse_prune.attention"},
    {"sparse_prune.layer_state", "sparse_prune.pruner", "sparse_prune.cache", "sparse_prune.passkey"},
    {"sparse_prune.export", "sparse_prune.evaluation", "sparse_prune.retrieval_heads", "sparse_prune.distillation"},
    {"sparse_prune.callbacks"},
    {"sparse_prune.recipes"},
    {"sparse_prune.__main__"},
]


def modules():
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), file


def rank(module):
    for level, names in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    raise AssertionError(f"{module} has no place in the order of imports")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_package_on_disk_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {module for module, file in modules() if file.name == "__init__.py"}
    assert listed == found


def test_imports_run_one_way():
    for module, file in modules():
        if module == "sparse_prune":
            continue
        for name in imported(file):
            if name.startswith("sparse_prune."):
                assert rank(name) <= rank(module), f"{module} imports {name}"


def test_the_engine_knows_neither_lightning_nor_wandb():
    for module, file in modules():
        roots = {name.partition(".")[0] for name in imported(file)}
        if rank_of_engine(module):
            assert not roots & {"pytorch_lightning", "lightning", "wandb"}, module


def rank_of_engine(module):
    return module == "sparse_prune" or rank(module) < rank("sparse_prune.callbacks")


def test_the_engine_imports_without_optional_packages():
    code = """
import sys
sys.modules |= dict.fromkeys(("transformers", "wandb", "huggingface_hub", "matplotlib"))
import sparse_prune, sparse_prune.attention, sparse_prune.export, sparse_prune.passkey, sparse_prune.pruner
"""
    subprocess.run([sys.executable, "-c", code], check=True)
