"""A machine is asked by multiplying; lesser ones are emulated."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from sparse_prune import precision
from sparse_prune.precision import fast_autocast, fast_dtype, fast_precision
from sparse_prune.recipes.base.trainer import RecipeTrainer


@pytest.fixture(autouse=True)
def forgotten():
    precision._is_fast.cache_clear()
    yield
    precision._is_fast.cache_clear()


@pytest.mark.parametrize(("speed", "chosen"), [(0.1, "32-true"), (200.0, "bf16-mixed")])
def test_the_faster_type_is_taken_and_the_slower_named_once(speed, chosen, monkeypatch, caplog):
    monkeypatch.setattr(precision, "_gflops", lambda dtype: 100.0 if dtype == torch.float32 else speed)
    with caplog.at_level(logging.INFO, "sparse_prune"):
        assert fast_precision("cpu") == fast_precision("cpu") == chosen
    fast = chosen == "bf16-mixed"
    assert fast_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if fast else torch.float32)
    line = "Precision: float32, not bfloat16, which a thread of this CPU multiplies at 0.1 GFLOP/s, float32 at 100."
    assert caplog.messages == ([] if fast else [line])
    with fast_autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == fast_dtype(torch.bfloat16, "cpu")


def test_a_recipe_takes_auto_for_the_precision(monkeypatch):
    monkeypatch.setattr(precision, "_gflops", lambda dtype: 100.0 if dtype == torch.float32 else 0.1)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    assert RecipeTrainer(accelerator="cpu", precision="auto", **quiet).precision == "32-true"
    assert RecipeTrainer(accelerator="cpu", precision="bf16-mixed", **quiet).precision == "bf16-mixed"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN to emulate a CPU with")
def test_a_cpu_without_avx512_computes_in_float32():
    code = "from sparse_prune.precision import fast_precision; print(fast_precision('cpu'))"
    lesser = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=lesser, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "32-true"
