"""The documentation's code runs, and its reference is whole. Links and anchors are checked by `make docs`."""

import importlib
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, code in enumerate(code_blocks("tutorial.md")):
        exec(compile(code, f"tutorial.md, block {number}", "exec"), names)
    assert names["same"]
    assert names["same_text"]
    assert names["small"].nbytes() < names["all_bytes"]
    assert not names["pruning"].pruner.open_layers
    assert all(state.layer.mode == "sparse" for state in names["pruning"].pruner.layers.values())
    assert 0.55 < names["pruning"].pruner.total_sparsity <= 0.61
    assert "bit for bit: True" in capsys.readouterr().out


@pytest.mark.parametrize(
    "package",
    [
        "sparse_prune",
        "sparse_prune.attention",
        "sparse_prune.callbacks",
        "sparse_prune.export",
        "sparse_prune.kernels",
    ],
)
def test_every_public_name_is_in_the_reference(package):
    names = set(importlib.import_module(package).__all__)
    assert names <= {name.rpartition(".")[2] for name in referenced()}


def test_the_reference_names_what_can_be_imported():
    for name in referenced():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def referenced():
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
