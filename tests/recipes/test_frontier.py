"""The scripts behind docs/frontier.md: every method runs, goes on where it stopped, and fills the page."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """As for a script: what lies beside it can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


@pytest.mark.slow
def test_every_method_runs_and_a_broken_off_command_goes_on(tiny_model, tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    sizes = ["--length", "512", "--steps", "4", "--sparsities", "0.5", "--seeds", "0", "--tests", "1", "--prompts", "1"]
    command = ["frontier.py", "--model", tiny_model, *sizes, "--output", output]
    run(monkeypatch, *command, "--only", "dense")
    run(monkeypatch, *command)
    rows = json.loads(output.read_text())["rows"]
    assert all(row["tasks"].keys() == {"passkey", "needle"} for row in rows)
    assert [row["method"] for row in rows] == list(runpy.run_path(str(BENCHMARKS / "frontier.py"))["METHODS"])
    assert capsys.readouterr().out.count("{'method': 'dense',") == 1
    for row in rows:
        expected = 0.0 if row["method"].startswith("dense") else 0.5
        assert row["achieved"] == pytest.approx(expected, abs=0.05), row
        assert 0 < row["loss"] < 10, row
    losses = {row["method"]: row["loss"] for row in rows}
    assert len(set(losses.values())) > len(losses) / 2  # the methods differ


def test_a_run_that_fails_is_named_left_out_and_tried_again(tiny_model, tmp_path, monkeypatch, capsys):
    sizes = ["--length", "256", "--steps", "3", "--sparsities", "0.5", "--seeds", "0", "--tests", "1", "--prompts", "1"]
    command = ["frontier.py", "--model", tiny_model, *sizes, "--output", tmp_path / "found.json", "--only"]
    fit = pl.Trainer.fit

    def full(trainer, module, datamodule):
        if module.hparams.learning_rate > 2e-4:
            raise torch.OutOfMemoryError("out of memory\nand more")
        fit(trainer, module, datamodule=datamodule)

    with monkeypatch.context() as patched:
        patched.setattr(pl.Trainer, "fit", full)
        with pytest.raises(SystemExit, match="Failed.*: dense, 3x learning rate, sparsity 0, seed 0") as ended:
            run(monkeypatch, *command, "dense, 3x learning rate", "dense")
    assert ended.value.code != 0
    assert "seed 0: failed: OutOfMemoryError: out of memory\n" in capsys.readouterr().out
    assert [row["method"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == ["dense"]
    run(monkeypatch, *command, "dense, 3x learning rate", "dense")
    found = [row["method"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]]
    assert found == ["dense", "dense, 3x learning rate"]


def test_a_file_of_other_settings_is_refused(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "found.json").write_text(json.dumps({"setup": {"length": 99}, "rows": []}))
    with pytest.raises(SystemExit):
        run(monkeypatch, "frontier.py", "--model", tiny_model, "--output", tmp_path / "found.json")
    assert "must be of the same settings" in capsys.readouterr().err


def rows(seed):
    return [
        {"method": method, "sparsity": sparsity, "seed": seed, "achieved": sparsity, "loss": loss}
        | {"tasks": {"passkey": {"accuracy": 0.5}, "multi_key": {"accuracy": 1.0}}}
        for method, sparsity, loss in [
            ("dense", 0.0, 2.0),
            ("gradual, cubic", 0.7, 2.1),
            ("gradual, good", 0.7, 2.05),
            ("gradual, bad", 0.7, 2.2),
            ("gradual, odd", 0.7, 2.1 + (0.01 if seed else -0.01)),
        ]
    ]


def test_the_page_shows_results_in_order_and_keeps_its_text(tmp_path, monkeypatch):
    setup = {"length": 512, "block_size": 16, "steps": 24, "learning_rate": 1e-4, "tests": 4}
    setup |= {"questions per task": 60, "machine": "a machine", "versions": "torch 0"}
    (tmp_path / "found.json").write_text(json.dumps({"setup": setup, "rows": rows(0) + rows(1)}))
    page = tmp_path / "frontier.md"
    page.write_text("before\n<!-- found -->\nold\n<!-- end -->\nafter\n")
    run(monkeypatch, "frontier_page.py", tmp_path / "found.json", "--page", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- found -->\n512 tokens, blocks of 16, 24 optimizer steps at 0.0001")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == (
        "| method | pruned | loss | over dense, per seed | passkey | multi key | against gradual, cubic |"
    )
    assert lines[2:] == [
        "| dense | 0.0% | 2.0000 | +0.00% / +0.00% | 50% | 100% | |",
        "| gradual, good | 70.0% | 2.0500 | +2.50% / +2.50% | 50% | 100% | better |",
        "| gradual, cubic | 70.0% | 2.1000 | +5.00% / +5.00% | 50% | 100% | |",
        "| gradual, odd | 70.0% | 2.1000 | +4.50% / +5.50% | 50% | 100% | mixed |",
        "| gradual, bad | 70.0% | 2.2000 | +10.00% / +10.00% | 50% | 100% | worse |",
    ]
    assert (tmp_path / "frontier" / "found.png").stat().st_size > 1000


def test_variants_are_compared_with_what_was_run():
    page = runpy.run_path(str(BENCHMARKS / "frontier_page.py"))
    rows = [
        {
            "method": method,
            "sparsity": sparsity,
            "seed": 0,
            "loss": loss,
            "achieved": sparsity,
            "tasks": {},
        }
        for method, sparsity, loss in [
            ("dense, questions", 0.0, 2.0),
            ("gradual, diagonals half shared", 0.7, 2.2),
            ("gradual, other", 0.7, 2.1),
        ]
    ]
    found = page["results"](rows)
    assert [(result.against, result.verdict) for result in found] == [
        ("gradual, diagonals half shared", verdict) for verdict in ("", "better", "")
    ]
    setup = {"length": 512, "block_size": 16, "steps": 24, "learning_rate": 1e-4, "tests": 4}
    setup |= {"questions per task": 60, "machine": "a machine", "versions": "torch 0"}
    assert "| against gradual, diagonals half shared |" in page["table"](found, setup)
    assert "against" not in page["table"](page["results"](rows[:2]), setup)  # nothing else was run
    assert [result.rises for result in found] == [[0.0], pytest.approx([0.05]), pytest.approx([0.1])]


def test_a_seed_without_its_dense_fine_tune_is_named(tmp_path, monkeypatch, capsys):
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"setup": {}, "rows": rows(0) + rows(1)[1:]}))
    with pytest.raises(SystemExit):
        run(monkeypatch, "frontier_page.py", found)
    assert "found.json: `rows` must hold 'dense' of every seed, got none of [1]." in capsys.readouterr().err


def test_one_seed_is_shown_with_its_intervals():
    share = runpy.run_path(str(BENCHMARKS / "frontier_page.py"))["_share"]
    assert share([{"accuracy": 0.5, "low": 0.377, "high": 0.623}]) == "50% (38% to 62%)"
    assert share([{"accuracy": 0.5, "low": 0.3, "high": 0.7}] * 2) == "50%"


def test_a_page_without_markers_is_refused():
    replace_between = runpy.run_path(str(BENCHMARKS / "frontier_page.py"))["replace_between"]
    with pytest.raises(ValueError, match="must hold `<!-- found -->`"):
        replace_between("nothing here", "found", "text")
