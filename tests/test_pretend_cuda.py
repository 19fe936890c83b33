"""What a run on a GPU goes through, on a pretended CUDA device (`support/pretend_cuda`), kernels interpreted.

In processes of their own: torch asks once, when it is imported, what devices there are.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the device is compiled by g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
]

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"


def beside_the_device(*command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, BENCHMARKS))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.pretend_cuda", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("file", ["test_on_a_gpu.py", "test_cache.py", "kernels/test_tables.py"])
def test_what_is_marked_gpu_passes(file):
    ended = beside_the_device("-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", TESTS / file)
    assert " passed" in ended
    assert " skipped" not in ended


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("kernels_once", ["--length", "40", "--blocks", "32"]),
        ("random_cases", ["--seconds", "1", "--longest", "48"]),
        ("whole_run", ["--rehearse"]),
        ("steps", ["--rehearse"]),
    ],
)
def test_a_stage_of_the_campaign_passes(stage, arguments, tmp_path):
    beside_the_device(BENCHMARKS / "gpu" / f"{stage}.py", "--output", tmp_path / "rows.json", *arguments)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["setup"]["device"] == "pretended"
    assert found["rows"]
