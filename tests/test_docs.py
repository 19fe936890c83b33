"""The documentation's code runs, and its reference is whole. Links and anchors are checked by `make docs`."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


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


def test_a_score_of_ones_own_is_short_and_prunes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, blocks = {}, code_blocks("scores.md")
    for number, code in enumerate(blocks):
        exec(compile(code, f"scores.md, block {number}", "exec"), names)
    assert len(blocks[0].splitlines()) < 40
    results = capsys.readouterr().out
    assert results.count("50% of the connections are pruned") == 3
    own, influence, answers = names["own"], names["by_influence"], names["pruner"]
    assert own.score_used.kind == "Sureness"
    known = [state.scores.value() for state in own.layers.values()]
    assert all(0 < float(part[part.isfinite()].max()) <= 1 for part in known)
    assert any(not torch.equal(own.patterns[name].keep, pattern.keep) for name, pattern in influence.patterns.items())
    assert all(state.scores.value().tril().abs().max() > 0 for state in answers.layers.values())


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


def test_every_error_in_troubleshooting_is_one_of_the_library():
    known = list(messages())
    tables = re.findall(
        r"^\| Message begins.*?\n\n", (DOCS / "troubleshooting.md").read_text(), re.DOTALL | re.MULTILINE
    )
    first_cells = [row.split(" | ")[0] for table in tables for row in table.strip().splitlines()[2:]]
    quotes = [quote for cell in first_cells for _, quote in re.findall(r"(`+) ?(.+?) ?\1(?!`)", cell)]
    assert len(quotes) > 30
    for quote in quotes:
        wanted = re.compile(".*".join(map(re.escape, quote.split("..."))), re.DOTALL)
        assert any(wanted.search(message) for message in known), quote


def messages():
    """All texts in the library's code, with what is filled in left out."""
    for folder in ("sparse_prune", "callbacks", "recipes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_the_site_asks_no_other_server():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["theme"]["font"] is False  # else fonts come from a server
    assert not {"extra_javascript", "repo_url"} & set(settings)
    for page in DOCS.rglob("*.md"):
        assert not re.search(
            r"!\[[^]]*\]\(\w+://|<(?:img|script|link|iframe)\b|^```mermaid", page.read_text(), re.MULTILINE
        ), page


@pytest.mark.parametrize("level", ["not_found", "anchors"])
def test_dead_links_stop_the_build(level):
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["validation"]["links"][level] == "warn"
    assert re.search(r"^docs:.*\n\t.*mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "make lint docs" in (ROOT / ".ci" / "run").read_text()
