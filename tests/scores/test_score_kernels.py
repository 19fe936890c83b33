"""A score names its own kernel, which nothing else has to know."""

import sys
import types

import pytest
import torch

from sparse_prune import BlockStatistics, Influence, Score
from sparse_prune.kernels import AttentionOptions, api, probe_score

CALL = *torch.randn(3, 1, 2, 32, 16), (16, 16)
GIVEN = {"causal": True, "options": AttentionOptions()}


class Ones(Score):
    kernel = "own_kernels:ones"

    def add(self, tile):
        return torch.ones(2, tile.kv_blocks)


class Twos(Ones):
    def add(self, tile):
        return 2 * super().add(tile)


@pytest.fixture
def launched(monkeypatch):
    """Calls of the kernel, on a device whose probe Triton computes."""
    calls, module = [], types.ModuleType("own_kernels")

    def ones(*args, **kwargs):
        calls.append((args, kwargs))
        return BlockStatistics(torch.full((1, 2, 2, 2), 5.0), torch.ones(1, 2), ("Ones",))

    module.ones = ones
    monkeypatch.setitem(sys.modules, "own_kernels", module)
    monkeypatch.setattr(api, "_probe_kernels", lambda query, block_size: module)
    return calls


def test_a_kernel_computes_the_sums_of_its_score_alone(launched):
    assert probe_score(Ones(), *CALL, **GIVEN).sums[0, 0, 0, 0] == 5.0
    (args, kwargs) = launched.pop()
    assert args == (*CALL[:3], None, CALL[3])
    assert kwargs == {**GIVEN, "pattern": None}
    assert probe_score(Twos(), *CALL, **GIVEN).sums[0, 0, 0, 0] == 2.0
    assert not launched


def test_without_triton_torch_computes_it(launched, monkeypatch):
    monkeypatch.setattr(api, "_probe_kernels", lambda query, block_size: None)
    assert probe_score(Ones(), *CALL, **GIVEN).sums[0, 0, 0, 0] == 1.0
    assert not launched


def test_influence_is_computed_by_its_kernel(monkeypatch):
    from sparse_prune.kernels.triton import attend

    asked, gradient = [], torch.randn(1, 2, 32, 16)
    monkeypatch.setattr(api, "_probe_kernels", lambda query, block_size: attend)
    wanted = attend.influence(*CALL[:3], gradient, CALL[3], **GIVEN)
    monkeypatch.setattr(attend, "influence", lambda *args, **kwargs: asked.append(args) or wanted)
    assert probe_score(Influence(), *CALL, gradient=gradient, **GIVEN) is wanted
    assert len(asked) == 1
    with pytest.raises(ValueError, match="uses the gradient"):
        probe_score(Influence(), *CALL, **GIVEN)
