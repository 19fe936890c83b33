"""The GPU campaign, rehearsed: its stages pass, go on where they stopped, and say what fails."""

import json
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("triton")

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "campaign.py"


def rehearse(folder, *stages):
    command = [sys.executable, str(CAMPAIGN), "--output", str(folder), "--rehearse", "--stage", *stages]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_rehearsal_passes_and_is_not_repeated(tmp_path):
    done = rehearse(tmp_path, "a", "c")
    assert done.returncode == 0, done.stdout + (tmp_path / "campaign.log").read_text()[-3000:]
    names = [row["name"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]]
    assert len(names) == 10
    whole = {row["name"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert list(whole) == ["train", "resume", "export", "decode"]
    assert whole["train"]["sparsity"] > 0.3
    before = (tmp_path / "a.json").stat().st_mtime_ns
    assert rehearse(tmp_path, "a").returncode == 0
    assert (tmp_path / "a.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_steps_are_told_apart(tmp_path):
    done = rehearse(tmp_path, "f")
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["pruned"] * 16 + ["dense"] * 16
    assert rows[15]["swapped"] == 2
    moved = [new["step"] for old, new in pairwise(rows[:16]) if new["sparsity"] != old["sparsity"]]
    assert moved
    assert {row["step"] for row in rows if row["decided"]} >= set(moved)
    assert rows[15]["sparsity"] > 0.3
    for kind in ("dense run", "moving", "deciding", "swapped"):
        assert f"  {kind}: " in done.stdout


@pytest.fixture
def campaign(tmp_path):
    """The driver's names, with a stage "z" that runs what the test writes."""
    names = runpy.run_path(str(CAMPAIGN))
    script = tmp_path / "z.py"
    names["STAGES"]["z"] = names["Stage"]("a test's", 0.05, str(script))

    def perform(code):
        script.write_text(code)
        return names["perform"]("z", tmp_path, rehearse=True)

    return perform


def test_a_failure_is_one_line_and_the_end_is_told(campaign, capsys):
    assert campaign("print('summary: 3 apples')").splitlines()[0] == "  3 apples"
    assert capsys.readouterr().out == ""
    told = campaign("print('probe: failed: ValueError: no')\nraise SystemExit(1)")
    assert "1 failures" in told
    assert told.endswith("FAILED")
    assert capsys.readouterr().out == "z: probe: failed: ValueError: no\n"
    assert campaign("import nothing_of_this_name").endswith("FAILED")
    assert "No module named 'nothing_of_this_name'" in capsys.readouterr().out
    assert campaign("import time; time.sleep(60)").endswith("past its 0.05 minutes")


def test_wrong_kernels_fail(monkeypatch):
    monkeypatch.syspath_prepend(str(CAMPAIGN.parents[1]))
    import agreement
    import torch

    from sparse_prune.fixed_patterns import random_pattern

    pattern, exact = random_pattern(2, 32, 16, density=1.0), agreement._results
    call = [torch.randn(1, 2, 32, 16).half() for _ in range(4)]
    assert max(agreement.check(tuple(call[:3]), call[3], pattern).values()) <= 1.0

    def wrong(*given):
        found = exact(*given)
        return [*found[:2], found[2] + 0.1, found[3]] if given[4] == "triton" else found

    monkeypatch.setattr(agreement, "_results", wrong)
    with pytest.raises(ArithmeticError, match="gradient of key .* times what is allowed"):
        agreement.check(tuple(call[:3]), call[3], pattern)


def test_gradients_that_cancel_are_measured_by_their_terms(monkeypatch):
    """A row that sees one key has no gradient; what the kernels have instead is the rounding of their output."""
    monkeypatch.syspath_prepend(str(CAMPAIGN.parents[1]))
    from gpu import random_cases

    assert max(random_cases.run(843, 96).values()) < 0.5
