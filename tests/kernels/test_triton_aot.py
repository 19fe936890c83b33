"""Every shipped configuration compiles for sm_80 and sm_90 without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may have, bytes (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "aot.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_no_configuration_spills_or_takes_too_much(compiled):
    assert len(compiled) == 5 * 2 * 3 * 2
    for row in compiled:
        assert row["spills"] == 0, row
        assert row["shared"] <= LIMIT[row["capability"]], row
        assert row["registers"] * 32 * row["num_warps"] <= 65536, row


@pytest.mark.slow
def test_hopper_uses_its_own_matrix_products(compiled):
    for row in compiled:
        # Its products take 64 rows at least; a decoding program has 16.
        assert row["wgmma"] == (row["capability"] == 90 and row["kernel"] != "decode"), row
        assert row["wgmma"] or row["mma"]
