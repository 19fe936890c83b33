"""What a GPU run does, on a pretended one: no tensor is left behind on the CPU, and decoding waits for nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import AttentionPruner, CubicSchedule
from sparse_prune.attention.measure import time_attention
from sparse_prune.cache import PatternCache
from sparse_prune.export import load, save_pretrained
from sparse_prune.kernels import skipping_backends
from sparse_prune.scores import Influence

pytest.importorskip("triton")
from support.pretend_cuda import CUDA, OnDevice, pretend_cuda  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
SIZES = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LENGTH = 64


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path))
    with pretend_cuda(monkeypatch) as pretence:
        yield pretence


def tokens():
    return torch.randint(3, 50, (1, LENGTH), generator=torch.Generator()).to(CUDA)


def pruned(score=None, steps=6):
    """A model trained on the device until its layers settled, and its pruner."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(CUDA)
    pruner = AttentionPruner(sparsity=CubicSchedule(final=0.4, end_step=4), block_size=16, patience=1, score=score)
    pruner.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = tokens()
    for step in range(1, steps + 1):
        with pruner.probing():
            model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.update(step)
    return model, pruner


def test_the_device_refuses_what_a_gpu_refuses(device):
    here, away = torch.ones(3, device="cuda"), torch.ones(3)
    assert here.device == CUDA
    assert isinstance(here + 1, OnDevice)
    assert (here[torch.tensor([0, 1])] + torch.tensor(2.0)).tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="same device"):
        here + away
    with pytest.raises(RuntimeError, match="same device"):
        away.index_select(0, torch.zeros(1, dtype=torch.int64, device="cuda"))
    weights = torch.ones(3, device="cuda", requires_grad=True)
    (weights * here).sum().backward()
    assert weights.grad.device == CUDA
    assert device.waits == ["aten::_to_copy"]


@pytest.mark.parametrize("score", [None, Influence()], ids=["attention", "gradient"])
def test_a_loop_prunes_measures_swaps_and_trains_on(device, score):
    model, pruner = pruned(score)
    assert pruner.total_sparsity == pytest.approx(0.4, abs=0.05)
    assert {"probe_kernel"} | ({"influence_kernel"} if score else set()) <= set(device.launches)
    for name, state in pruner.layers.items():
        times = time_attention(state.layer, skipping_backends(CUDA), 1)
        assert {"dense", "triton", "gather"} <= set(times)
        pruner.swap(name, "triton")
    ids, before = tokens(), len(device.launches)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert set(device.launches[before:]) == {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert all(parameter.grad.device == CUDA for parameter in model.parameters())


@torch.no_grad()
def test_an_export_is_loaded_and_decodes_by_the_kernel(device, tmp_path):
    model, pruner = pruned()
    for name in pruner.layers:
        pruner.swap(name, "triton")
    model.eval()
    save_pretrained(model.cpu(), tmp_path / "exported", pruner=pruner)
    loaded, ids = load(tmp_path / "exported").to(CUDA), tokens()
    wanted, cache, device.launches[:] = loaded(ids, use_cache=False).logits, PatternCache(loaded), []
    loaded(ids[:, :49], past_key_values=cache)
    for step in range(49, 60):
        before = len(device.waits)
        found = loaded(ids[:, step : step + 1], past_key_values=cache).logits
        assert float((found[:, -1] - wanted[:, step]).abs().max()) < 1e-4
        assert step < 51 or device.waits[before:-1] == []  # the last one is this test's own
    assert device.launches.count("decode_kernel") == 11 * len(cache.layers)
