"""A backend is one record: what is asked of it anywhere is answered there. The list in CONTRIBUTING is followed."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparse_prune import BlockPattern
from sparse_prune.attention import apply_patterns
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.measure import time_attention, tune
from sparse_prune.callbacks import KernelSwap
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import (
    BACKENDS,
    AttentionOptions,
    Backend,
    block_sparse_attention,
    check_trains,
    moving_backend,
    reference,
    skipping_backends,
    usable_backend,
)


@pytest.fixture
def toy(monkeypatch):
    """What a file `kernels/backends/toy.py` would hold; the calls that it got."""
    calls = []

    def attend(query, key, value, pattern, options):
        calls.append(pattern)
        return reference.attend(query, key, value, pattern, options)

    backend = Backend("toy", attend, skips_on=("cpu",), rank=1, tune=lambda *call: calls.append("tuned"))
    monkeypatch.setitem(BACKENDS, "toy", backend)
    return calls


def test_a_new_backend_computes(toy):
    query, key, value = torch.randn(3, 1, 2, 64, 16)
    pattern = random_pattern(2, 64, 16, density=0.5)
    found = block_sparse_attention(query, key, value, pattern, backend="toy")
    assert toy == [pattern]
    assert found.equal(reference.attend(query, key, value, pattern, AttentionOptions()))


def test_a_new_backend_serves_a_model(toy):
    model = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
    (layer,) = apply_patterns(
        model, {"self_attn": BlockPattern(torch.eye(4).bool().expand(2, 4, 4), (16, 16), False, 64, 64)}, backend="toy"
    )
    model(torch.randn(1, 64, 16)).sum().backward()
    assert (layer.mode, layer.backend) == ("sparse", "toy")
    assert len(toy) == 1
    assert not layer.traceable


def test_a_new_backend_is_measured_and_taken(toy, monkeypatch):
    layer = PrunableAttention("layer", 2, 2, causal=True)
    layer.pattern = random_pattern(2, 64, 16, density=0.5)
    layer.attend(*torch.randn(3, 1, 2, 64, 16), AttentionOptions(), dense=lambda: None)
    assert "toy" in skipping_backends(torch.device("cpu"))
    assert tune(layer, ["toy"], 1.0) == ["toy"]
    assert toy == ["tuned"]
    assert list(time_attention(layer, ["toy"], repeats=1)) == ["dense", "toy"]

    def times(layer, names, *options):
        return dict.fromkeys(("dense", *names), 2.0) | {"toy": 1.0}

    monkeypatch.setattr("sparse_prune.swap_timer.time_attention", times)
    assert KernelSwap()._event(layer, 3).backend == "toy"
    assert KernelSwap("toy")._event(layer, 3).backend == "toy"


def test_a_record_answers_what_is_asked_of_a_backend(monkeypatch):
    cpu, query, pattern = torch.device("cpu"), torch.empty(1, 2, 64, 16), random_pattern(2, 64, 16, density=0.1)
    shy = Backend(
        "shy", reference.attend, rank=1, trains=lambda device: False, usable=lambda: False,
        suits_moving=lambda query, pattern, options: options.window == 7,
    )  # fmt: skip
    monkeypatch.setattr("sparse_prune.kernels.backends.BACKENDS", {"shy": shy, **BACKENDS})
    with pytest.raises(ValueError, match="must train on a CUDA device"):
        check_trains("shy", cpu)
    assert usable_backend("shy") == "gather"
    assert skipping_backends(cpu) == skipping_backends(torch.device("meta")) == ("gather",)
    assert skipping_backends(torch.device("cuda")) == ("triton", "flex", "gather")
    assert moving_backend(query, pattern, AttentionOptions(window=7)) == "shy"
    assert moving_backend(query, pattern, AttentionOptions(window=8)) == "sdpa"


def test_a_file_in_the_folder_is_a_backend(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from sparse_prune.kernels.backend import Backend\n"
        "from sparse_prune.kernels.reference import attend\n"
        "BACKEND = Backend('mine', attend, rank=15)\n"
    )
    code = """
import pkgutil, sys
inner = pkgutil.iter_modules
def both(path=None, prefix=""):
    if path is not None and list(path)[0].endswith("backends"):
        path.append(sys.argv[1])
    return inner(path, prefix)
pkgutil.iter_modules = both
from sparse_prune.kernels import BACKENDS
print(*BACKENDS)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["triton", "mine", "flex", "gather", "reference", "sdpa"]


def test_what_takes_long_to_import_waits_for_its_call():
    code = (
        "import sys, sparse_prune.kernels\n"
        "assert not {'sparse_prune.kernels.flex', 'sparse_prune.kernels.triton.attend'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
