"""What does not fit a device's shared memory is launched with fewer stages, and said once."""

from dataclasses import replace

import pytest
import torch

from sparse_prune.kernels import AttentionOptions
from support.cases import inputs, random_pattern, run

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from sparse_prune.kernels.triton import memory, ops  # noqa: E402
from sparse_prune.kernels.triton.configs import LaunchConfig  # noqa: E402
from sparse_prune.kernels.triton.memory import within_memory  # noqa: E402

CONFIG = LaunchConfig((64, 64), 8, 3)
QUERY = torch.zeros(1, 4, 37, 16)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(memory, "_STAGES", {})


def small_device(fits):
    """Launches that record themselves on a device that holds `fits` stages."""
    tried = []

    def launch(config):
        tried.append(config.num_stages)
        if config.num_stages > fits:
            raise OutOfResources(262144, 232448, "shared memory")
        return config

    return launch, tried


def test_fewer_stages_are_used_and_warned_of_once(caplog):
    launch, tried = small_device(1)
    for _ in range(2):
        assert within_memory("forward", CONFIG, QUERY, AttentionOptions(), launch) == replace(CONFIG, num_stages=1)
    assert tried == [3, 2, 1, 1]
    assert caplog.text.count("Required: 262144") == 2
    within_memory("forward", CONFIG, QUERY, AttentionOptions(softcap=1.0), launch)
    assert tried == [3, 2, 1, 1, 3, 2, 1]


def test_what_fits_nowhere_is_refused_with_the_remedy():
    launch, tried = small_device(0)
    with pytest.raises(
        ValueError, match="must fit the memory of the forward kernel.*Required: 262144.*backend='gather'"
    ):
        within_memory("forward", CONFIG, QUERY, AttentionOptions(), launch)
    assert tried == [3, 2, 1]


@pytest.mark.parametrize("name", ["launch_forward", "launch_dq", "launch_dkdv"])
def test_training_goes_on(name, monkeypatch, caplog):
    """As on a card with 99 KiB of shared memory: an attention call of every pass is launched anew."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = tuple(t.detach().to(device, torch.float16).requires_grad_() for t in inputs(dim=16))
    pattern, inner = random_pattern(4, 37, 37, 16, True), getattr(ops, name)
    wanted = run(tensors, pattern, None, "triton")

    def launch(*args):
        if next(a for a in args if isinstance(a, LaunchConfig)).num_stages > 1:
            raise OutOfResources(262144, 232448, "shared memory")
        return inner(*args)

    monkeypatch.setattr(ops, name, launch)
    for found, want in zip(run(tensors, pattern, None, "triton"), wanted, strict=True):
        assert torch.equal(found, want)
    assert "It is launched with" in caplog.text
