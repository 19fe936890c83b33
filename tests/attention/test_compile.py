"""A swapped model compiles whole: torch.compile sees no break at attention, and follows what changes."""

import copy

import pytest
import torch

from sparse_prune import BlockPattern
from sparse_prune.attention import attach
from sparse_prune.cache import PatternCache
from support.families import make

pytest.importorskip("triton")


@pytest.fixture
def swapped():
    """A Llama with frozen patterns on the Triton backend."""
    model = make("llama")
    for seed, handle in enumerate(attach(model)):
        handle.pattern, handle.mode, handle.backend = pattern(seed), "sparse", "triton"
    torch._dynamo.reset()
    return model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")


def pattern(seed, length=32):
    keep = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5
    return BlockPattern(keep | torch.eye(2, dtype=torch.bool), (16, 16), True, length, length)


def tokens(length=32):
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_no_graph_break_output_and_gradients(swapped):
    model, compiled = swapped
    found, wanted = (m(tokens(), use_cache=False)[0] for m in (compiled, model))
    assert torch.equal(found, wanted)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(out.sum(), parameters) for out in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_other_lengths_padding_and_patterns_compile_anew(swapped):
    model, compiled = swapped
    first = compiled(tokens(), use_cache=False)[0]
    shorter = tokens(29)
    assert torch.equal(compiled(shorter, use_cache=False)[0], model(shorter, use_cache=False)[0])
    mask = torch.ones_like(shorter)
    mask[0, :5] = 0
    found, wanted = (m(shorter, attention_mask=mask, use_cache=False)[0] for m in (compiled, model))
    assert torch.equal(found, wanted)
    attach(model)[0].pattern = pattern(7)
    changed = compiled(tokens(), use_cache=False)[0]
    assert torch.equal(changed, model(tokens(), use_cache=False)[0])
    assert not torch.equal(changed, first)


@torch.no_grad()
def test_a_copy_compiles_with_its_own_patterns(swapped):
    model = copy.deepcopy(swapped[0])
    wanted = model(tokens(), use_cache=False)[0]
    attach(swapped[0])[0].pattern = pattern(7)  # frees the one that was copied
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(compiled(tokens(), use_cache=False)[0], wanted)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_goes_on_with_a_small_cache(swapped):
    model, compiled = swapped[0], torch.compile(swapped[0], backend="eager")
    cache, ids = PatternCache(model), tokens(40)
    # The second part has as many queries as new keys.
    found = [compiled(part, past_key_values=cache).logits for part in ids.split(20, 1)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_mask_that_shows_later_keys_stops_a_compiled_causal_layer(swapped):
    model, compiled = swapped
    shown = torch.ones(2, 1, 32, 32, dtype=torch.bool).tril()
    wanted = model(tokens(), attention_mask=shown, use_cache=False)[0]
    torch.testing.assert_close(compiled(tokens(), attention_mask=shown, use_cache=False)[0], wanted)
    shown[:, :, :8, :8] = True  # a prefix
    with pytest.raises(RuntimeError, match="'model.layers.0.self_attn' must get masks that show no later key"):
        compiled(tokens(), attention_mask=shown, use_cache=False)
