"""The GPU benchmark goes on where it stopped, and what fails takes nothing else along."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"lengths": [64, 96], "sparsities": [0.3, 0.9], "head-dims": [16], "groups": [2], "heads": [2], "block": [16]}


@pytest.fixture
def script(monkeypatch):
    """The script's names, with nothing that takes long; what it asked for stands in "calls", in order."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = runpy.run_path(str(BENCHMARKS / "attention.py"))
    calls = names["calls"] = []
    inside = names["main"].__globals__

    def sparse_times(backend, query, key, value, grad, pattern):
        calls.append((query.shape[2], "own" if pattern.sparsity == 0 else "ours"))
        return {"forward": 1.0, "both": 2.0}

    changes = {
        "sparse_times": sparse_times,
        "dense_times": lambda *tensors: {"FLASH": {"forward": 1.0, "both": 2.0}},
        "decode_times": lambda *call: {"dense_ms": 1.0, "ours_ms": 1.0, "union_density": 1.0},
        "check": lambda *call: not calls.append((call[0].shape[2], "check")),
        "probe": lambda *call, causal: None,
        "tune": lambda *call: calls.append((call[0].shape[2], "tune")),
        "commit": lambda: "abc",
    }
    for name, change in changes.items():
        monkeypatch.setitem(inside, name, change)
    names["globals"] = inside
    return names


def run(monkeypatch, script, output, **changes):
    options = [str(p) for name, sizes in (SIZES | changes).items() for p in (f"--{name}", *sizes)]
    monkeypatch.setattr(sys, "argv", ["attention.py", *options, "--output", str(output)])
    script["main"]()


def found(output):
    return [(row["length"], row["asked"], row["pass"]) for row in json.loads(output.read_text())["rows"]]


def test_kernels_are_checked_before_the_clock_runs_and_unreachable_sparsities_are_left_out(
    script, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, script, tmp_path / "out.json")
    assert script["calls"] == [(n, w) for n in (64, 96) for w in ("check", "check", "own", "ours")]
    assert "64  90%: left out, sink and diagonal allow 30% at most" in capsys.readouterr().out
    assert found(tmp_path / "out.json") == [(n, 0.3, part) for n in (64, 96) for part in ("forward", "both")]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_failure_takes_no_other_row_along_and_is_tried_again(script, tmp_path, monkeypatch):
    output, times = tmp_path / "out.json", script["globals"]["sparse_times"]

    def full(backend, query, *rest):
        if query.shape[2] == 64:
            raise torch.OutOfMemoryError("out of memory")
        return times(backend, query, *rest)

    with monkeypatch.context() as patched:
        patched.setitem(script["globals"], "sparse_times", full)
        with pytest.raises(SystemExit, match="tried again.*: 64 d16 g2"):
            run(monkeypatch, script, output)
    assert found(output) == [(96, 0.3, "forward"), (96, 0.3, "both")]
    script["calls"].clear()
    run(monkeypatch, script, output)
    assert {length for length, _ in script["calls"]} == {64}
    assert len(found(output)) == 4
    with pytest.raises(SystemExit):
        run(monkeypatch, script, output, block=[32])


def test_rows_are_kept_when_the_command_breaks_off(script, tmp_path, monkeypatch):
    times = script["globals"]["sparse_times"]

    def broken_off(backend, query, *rest):
        if query.shape[2] == 96:
            raise KeyboardInterrupt
        return times(backend, query, *rest)

    monkeypatch.setitem(script["globals"], "sparse_times", broken_off)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, script, tmp_path / "out.json")
    assert len(found(tmp_path / "out.json")) == 2


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_wrong_kernels_end_the_benchmark(monkeypatch, wrong):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check = runpy.run_path(str(BENCHMARKS / "attention.py"))["check"]
    inside = vars(check.__globals__["agreement"])
    attention = inside["block_sparse_attention"]

    def attend(query, key, value, pattern, options, backend):
        output = attention(query, key, value, pattern, options, backend="gather" if backend == "triton" else backend)
        if backend != "triton" or not wrong:
            return output
        return output * 1.1 if wrong == "output" else output + 0.3 * (value - value.detach()).repeat(1, 2, 1, 1)

    monkeypatch.setitem(inside, "block_sparse_attention", attend)
    pattern = check.__globals__["random_pattern"](2, 64, 16, density=0.7)
    query, key, value, grad = (torch.randn(1, heads, 64, 16, dtype=torch.float16) for heads in (2, 1, 1, 2))
    with pytest.raises(SystemExit, match=f"WRONG .*: {wrong}"):
        check(query, key, value, grad, pattern)
    wrong = ""
    assert check(query, key, value, grad, pattern)
