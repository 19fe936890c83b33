import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from sparse_prune import BlockPattern
from sparse_prune.attention import attach, detach, handle_of, list_layers, measure
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


def test_a_bias_is_seen_in_the_trial_run_and_at_the_first_probe(caplog):
    bias = torch.randn(LENGTH, LENGTH)
    assert "bias" in found(MaskedAttention(), (inputs(), bias))[0][-1]
    module = MaskedAttention()
    expected = module(inputs(), bias)
    (handle,) = attach(module)
    handle.probe_block_size = (BLOCK, BLOCK)
    torch.testing.assert_close(module(inputs(), bias), expected)
    assert "adds a bias" in handle.aside
    assert "adds a bias" in caplog.text
    handle.probe_block_size = None
    (handle,) = attach(module := MaskedAttention(), (inputs(), None))
    prune([handle])
    with pytest.raises(ValueError, match="masks that only hide keys.*adds a bias"):
        module(inputs(), bias)


class LearnedBias(MaskedAttention):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(LENGTH, LENGTH))

    def forward(self, x):
        return super().forward(x, self.bias[None] * 1.0)


def test_a_learned_bias_that_is_still_zero_is_seen_in_the_trial_run():
    with torch.no_grad():
        assert "bias" in found(LearnedBias(), inputs())[0][-1]


def test_without_an_example_the_first_probed_call_says_that_a_layer_is_causal():
    module = MaskedAttention()
    (handle,) = attach(module)
    handle.probe_block_size = (BLOCK, BLOCK)
    module(inputs(), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    assert handle.causal
    assert handle.statistics.sums[0].triu(1).sum() == 0


def prefix_mask(length=5, kind="bool"):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:, :length] = True
    return mask if kind == "bool" else torch.zeros(LENGTH, LENGTH).masked_fill(~mask, -torch.inf)


def by_hand(module, x, mask):
    """Attention of `MaskedAttention` under a (heads, length, length) mask of what may be seen."""
    query, (key, value) = split_heads(module.q(x), HEADS), module.kv(x).chunk(2, -1)
    key, value = (split_heads(part, 2).repeat_interleave(2, 1) for part in (key, value))
    weights = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mode", ["masked", "sparse"])
@pytest.mark.parametrize("example", ["prefix", "causal"])
def test_masks_that_show_later_keys_are_honoured(kind, mode, example):
    torch.manual_seed(0)
    module, x, mask = MaskedAttention(), inputs(), prefix_mask(kind=kind)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    (handle,) = attach(module, (x, mask if example == "prefix" else causal))
    assert handle.causal == (example == "causal")
    prune([handle], mode)
    keep = handle.pattern.keep
    if handle.causal:  # the pattern speaks of no key after the queries' own block, and says nothing against one in it
        keep = keep | torch.ones(3, 3, dtype=torch.bool).triu()
    kept = keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    torch.testing.assert_close(module(x, mask), by_hand(module, x, kept & prefix_mask()), atol=1e-5, rtol=1e-4)
    # And causal calls of the same layer stay causal.
    kept = handle.pattern.keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    torch.testing.assert_close(module(x, causal), by_hand(module, x, kept & causal), atol=1e-5, rtol=1e-4)


class Flagged(MaskedAttention):
    """Says with every call whether it is causal."""

    def forward(self, x, causal):
        query, (key, value) = split_heads(self.q(x), HEADS), self.kv(x).chunk(2, -1)
        key, value = split_heads(key, 2), split_heads(value, 2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True, scale=0.3)
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("found_causal", [True, False])
def test_the_call_decides_whether_it_is_causal(found_causal):
    torch.manual_seed(0)
    module, x = Flagged(), inputs()
    (handle,) = attach(module, (x, found_causal))
    assert handle.causal == found_causal
    dense = BlockPattern.dense(HEADS, LENGTH, LENGTH, BLOCK, found_causal)
    handle.pattern, handle.mode, handle.backend = dense, "sparse", "gather"
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(module(x, False), by_hand(module, x, everything), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module(x, True), by_hand(module, x, everything.tril()), atol=1e-5, rtol=1e-4)


REGISTRY = {"sdpa": F.scaled_dot_product_attention}


class ByPartial(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.core = nn.Linear(WIDTH, WIDTH), partial(F.scaled_dot_product_attention, is_causal=True)

    def forward(self, x):
        query = split_heads(self.q(x), HEADS)
        return self.core(query, query, query).transpose(1, 2).flatten(2)


class ByRegistry(ByPartial):
    def forward(self, x):
        query = split_heads(self.q(x), HEADS)
        return REGISTRY["sdpa"](query, query, query, is_causal=True).transpose(1, 2).flatten(2)


class ByGetattr(ByPartial):
    def forward(self, x):
        query = split_heads(self.q(x), HEADS)
        call = getattr(F, "scaled_dot_" + "product_attention")
        return call(query, query, query, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", [ByPartial, ByRegistry, ByGetattr])
def test_sdpa_under_another_name_is_taken_over(kind):
    torch.manual_seed(0)
    module, x = kind(), inputs()
    assert found(module, x) == [("", HEADS, HEADS, True, None)]
    (handle,) = attach(module, x)
    assert attach(module, x) == [handle]
    prune([handle])
    query = split_heads(module.q(x), HEADS)
    mask = handle.pattern.token_mask(LENGTH, LENGTH)
    weights = (query @ query.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(module(x), (weights @ query).transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-4)
    detach(module)
    assert handle_of(module) is None
    if kind is not ByGetattr:  # nothing but a call can tell
        assert found(kind())[0][:4] == ("", HEADS, HEADS, True)


class WideValues(ByPartial):
    def forward(self, x):
        query = split_heads(self.q(x), HEADS)
        return F.scaled_dot_product_attention(query[..., :6], query[..., :6], query).transpose(1, 2).flatten(2)


def test_values_of_another_size_than_keys_are_pruned_and_timed():
    torch.manual_seed(0)
    module, x = WideValues(), inputs()
    (handle,) = attach(module, x)
    prune([handle])
    query = split_heads(module.q(x), HEADS)
    mask = handle.pattern.token_mask(LENGTH, LENGTH)
    weights = query[..., :6] @ query[..., :6].transpose(2, 3) * 6**-0.5
    expected = (weights.masked_fill(~mask, -torch.inf).softmax(-1) @ query).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)
    assert handle.last_shape.value_dim == 8
    assert set(measure.time_attention(handle, ["gather"], repeats=1)) == {"dense", "gather"}


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
