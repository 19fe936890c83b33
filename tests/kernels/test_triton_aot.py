"""Launch configurations compile for the devices that take them, and spill no registers but where the list says so."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from sparse_prune.kernels.triton.configs import SHARED_MEMORY, device_class  # noqa: E402

AHEAD = Path(__file__).parents[2] / "benchmarks" / "gpu" / "ahead_of_time.py"
GROUPS = runpy.run_path(str(AHEAD))["GROUPS"]

MORE = 0 if triton.__version__.startswith("3.7.") else 160
"""Bytes that other compilers than the pinned one may spill beyond the list."""


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_no_configuration_spills_more_or_takes_more_than_is_known(group):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(AHEAD), group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(GROUPS[group])
    for row in rows:
        assert row["spilled"] <= row["spills"] + MORE, row
        assert row["shared"] <= SHARED_MEMORY[device_class(row["capability"])], row
        assert row["tmem_size"] <= 512, row  # columns of tensor memory, on 10.0
        assert not row["serialized"], row
        assert row["registers"] * 32 * row["num_warps"] <= 65536, row
        if group in ("plain", "probe"):  # Hopper's own products take 64 rows at least; a decoding program has 16
            few = row["kernel"] == "decode" or (row["kernel"] == "dkdv" and row["head_dim"] == 256) or row["masks"] & 2
            assert row["wgmma"] == (row["capability"] == 90 and not few), row
            assert row["wgmma"] or row["mma"]


@pytest.mark.slow
def test_the_instruction_model_counts_what_the_loops_must_multiply(tmp_path):
    """Tensor cycles that the machine code multiplies are those that the tiles ask for: no warp repeats another's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(AHEAD.parents[1])
    command = [sys.executable, str(AHEAD.with_name("instruction_model.py")), "--output", str(tmp_path / "model.json")]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert len(rows) == 16
    for row in rows:
        assert row["tensor"] == row["needed_tensor"], row
        assert row["issue"] <= {64: 1.05, 128: 0.8}[row["head_dim"]] * row["needed_tensor"], row
