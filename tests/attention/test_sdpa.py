import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from sparse_prune import BlockPattern
from sparse_prune.attention import attach, detach, handle_of, list_layers
from sparse_prune.attention.sdpa import attend
from support.nano import CausalSelfAttention, NanoGPT

LENGTH, BLOCK, WIDTH, HEADS = 24, 8, 32, 4


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class MaskedAttention(nn.Module):
    """Takes its mask from outside, has fewer key heads, imports the function by name."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.q, self.kv, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), dropout

    def forward(self, x, mask=None):
        key, value = self.kv(x).chunk(2, -1)
        out = scaled_dot_product_attention(
            split_heads(self.q(x), HEADS), split_heads(key, 2), split_heads(value, 2), mask, enable_gqa=True, scale=0.3
        )
        return out.transpose(1, 2).flatten(2)


class Helper(MaskedAttention):
    """Calls it in a method, through an alias."""

    def forward(self, x):
        return self.mix(split_heads(self.q(x), HEADS))

    def mix(self, x, attend=F.scaled_dot_product_attention):
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


class Twice(Helper):
    def forward(self, x):
        return self.mix(split_heads(self.q(x), HEADS)) + self.mix(split_heads(x, HEADS))


class Cross(Helper):
    def forward(self, x):
        query = split_heads(self.q(x), HEADS)
        return F.scaled_dot_product_attention(query[:, :, :2], query, query)


def inputs(batch=2):
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def prune(handles, mode="masked", density=0.4):
    for seed, handle in enumerate(handles):
        blocks = LENGTH // BLOCK
        keep = torch.rand(handle.num_heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density
        keep |= torch.eye(blocks, dtype=torch.bool)
        handle.pattern = BlockPattern(keep, (BLOCK, BLOCK), handle.causal, LENGTH, LENGTH)
        handle.mode, handle.backend = mode, "gather"


def found(module, example=None):
    return [
        (layer.name, layer.num_heads, layer.num_kv_heads, layer.causal, layer.problem)
        for layer in list_layers(module, example)
    ]


@pytest.mark.parametrize("probing", [False, True])
def test_dense_layer_gives_the_modules_own_output_and_gradients(probing):
    torch.manual_seed(0)
    model = NanoGPT()
    names = list(model.state_dict())
    expected = model(tokens())
    expected.square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    handles = attach(model)
    if probing:
        for handle in handles:
            handle.probe_block_size = (BLOCK, BLOCK)
    output = model(tokens())
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
    assert list(model.state_dict()) == names
    assert (handles[0].statistics is not None) == probing


@pytest.mark.parametrize("kind", ["none", "padding", "mask", "float"])
def test_masked_layer_equals_a_dense_float_mask(kind):
    torch.manual_seed(0)
    module, x = MaskedAttention(), inputs()
    (handle,) = attach(module)
    prune([handle])
    mask = {
        "none": None,
        "padding": torch.arange(LENGTH).expand(2, 1, 1, -1) < torch.tensor([20, 24])[:, None, None, None],
        "mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2),
        "float": torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(torch.arange(LENGTH) > 20, -torch.inf),
    }[kind]
    output = module(x, mask)
    detach(module)
    float_mask = torch.zeros(2, HEADS, LENGTH, LENGTH)
    float_mask.masked_fill_(~handle.pattern.token_mask(LENGTH, LENGTH, x.device), -torch.inf)
    if mask is not None:
        float_mask += mask if mask.is_floating_point() else torch.zeros(()).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(output, module(x, float_mask), atol=1e-5, rtol=1e-4)


def test_pattern_survives_copies_and_pickles_and_detach_restores():
    torch.manual_seed(0)
    model = NanoGPT().eval()
    expected = model(tokens())
    prune(attach(model))
    pruned = model(tokens())
    assert (pruned - expected).abs().max() > 1e-2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens()), pruned)
        assert handle_of(other.h[0].attn) is not handle_of(model.h[0].attn)
    detach(model)
    assert torch.equal(model(tokens()), expected)
    assert "forward" not in vars(model.h[0].attn)


def test_layers_are_found_by_running_each_alone():
    assert found(NanoGPT()) == [("h.0.attn", 4, 4, True, None), ("h.1.attn", 4, 4, True, None)]
    assert found(MaskedAttention()) == [("", HEADS, 2, False, None)]
    assert found(Helper()) == [("", HEADS, HEADS, False, None)]


def test_an_example_shows_what_a_module_alone_does_not():
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert found(MaskedAttention(), (inputs(), causal)) == [("", HEADS, 2, True, None)]
    module = MaskedAttention()
    module.example_input_array = {"x": inputs(), "mask": causal}
    assert found(module) == [("", HEADS, 2, True, None)]


def test_an_example_takes_the_precision_of_the_model():
    module = MaskedAttention().bfloat16()
    module.example_input_array = (inputs(), torch.full((LENGTH, LENGTH), -torch.inf).triu(1))
    assert found(module) == [("", HEADS, 2, True, None)]
    assert found(NanoGPT().bfloat16(), tokens())[0][-1] is None  # token numbers stay integers


@pytest.mark.parametrize(
    ("module", "reason"), [(Twice(), "2 times"), (Cross(), "cross-attention"), (nn.Identity(), None)]
)
def test_what_cannot_be_pruned_is_named_with_its_reason(module, reason):
    assert [layer.problem is not None and reason in layer.problem for layer in list_layers(module)] == [True] * bool(
        reason
    )
    with pytest.raises(ValueError, match=reason or "no attention layers"):
        attach(module)


def test_a_bias_is_refused_when_found_and_when_probed():
    bias = torch.randn(LENGTH, LENGTH)
    assert "bias" in found(MaskedAttention(), (inputs(), bias))[0][-1]
    module = MaskedAttention()
    attach(module)[0].probe_block_size = (BLOCK, BLOCK)
    with pytest.raises(ValueError, match="0 and -inf"):
        module(inputs(), bias)


def test_a_causal_mask_on_a_layer_found_bidirectional_is_refused():
    module = MaskedAttention()
    attach(module)[0].probe_block_size = (BLOCK, BLOCK)
    with pytest.raises(ValueError, match="found bidirectional, but is called causal.*example_input_array"):
        module(inputs(), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


@torch.no_grad()
def test_the_last_query_against_cached_keys_gets_the_last_row_of_the_pattern():
    (handle,) = attach(CausalSelfAttention(WIDTH, HEADS))
    prune([handle])
    query, key, value = torch.randn(3, 1, HEADS, LENGTH, WIDTH // HEADS)
    whole = attend(handle, query, key, value, is_causal=True)
    torch.testing.assert_close(attend(handle, query[:, :, -1:], key, value), whole[:, :, -1:])
    with pytest.raises(ValueError, match="counts from the first key"):
        attend(handle, query[:, :, -2:], key, value, is_causal=True)
    with torch.enable_grad(), pytest.raises(ValueError, match="own tokens"):
        attend(handle, query[:, :, -1:], key, value)


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`example` must be an input of NanoGPT"):
        attach(NanoGPT(), torch.ones(2, 3))


def test_trial_leaves_training_mode_and_hooks_alone():
    module = CausalSelfAttention(WIDTH, HEADS)
    attach(module)
    assert module.training
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.slow
def test_swapped_model_compiles_without_a_graph_break():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model, ids = NanoGPT(), torch.randint(0, 50, (2, 32))
    for handle in attach(model):
        keep = torch.eye(2, dtype=torch.bool).expand(4, 2, 2).clone()
        handle.pattern = BlockPattern(keep, (16, 16), True, 32, 32)
        handle.mode, handle.backend = "sparse", "triton"
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))


def test_module_in_a_class_of_torch_as_fully_shard_makes_them_is_found():
    module = CausalSelfAttention(WIDTH, HEADS)
    module.__class__ = type("FSDPCausalSelfAttention", (CausalSelfAttention,), {"__module__": "torch.distributed.fsdp"})
    (handle,) = attach(module)
    assert handle.num_heads == HEADS
