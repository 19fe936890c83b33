import pytest
import torch
from torch import nn

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule
from sparse_prune.attention import attach, detach, find_layers, handle_of, list_layers

LENGTH, BLOCK, WIDTH, HEADS = 24, 8, 32, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
PADDING = torch.arange(LENGTH) >= torch.tensor([[20], [24]])


def inputs(batch_first=True):
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return x if batch_first else x.transpose(0, 1)


def encoder(**changes):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, **{"dropout": 0.0, "batch_first": True, **changes})
    return nn.TransformerEncoder(layer, 2)


def prune(handles, mode="masked"):
    for seed, handle in enumerate(handles):
        keep = torch.rand(HEADS, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.4
        keep |= torch.eye(3, dtype=torch.bool)
        handle.pattern = BlockPattern(keep, (BLOCK, BLOCK), handle.causal, LENGTH, LENGTH)
        handle.mode, handle.backend = mode, "gather"


def float_mask(pattern, *others):
    """(batch * heads, length, length), as `nn.MultiheadAttention` takes it."""
    mask = torch.zeros(2, HEADS, LENGTH, LENGTH)
    mask.masked_fill_(~pattern.token_mask(LENGTH, LENGTH, mask.device), -torch.inf)
    return sum(others, mask).flatten(0, 1)


CALLS = {
    "plain": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "bool mask and padding": {"attn_mask": CAUSAL < 0, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dense_and_masked_equal_the_module_with_a_float_mask(call, batch_first, need_weights):
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first), inputs(batch_first)
    kwargs = {**CALLS[call], "need_weights": need_weights, "average_attn_weights": False}
    example = {"query": x, "key": x, "value": x, **kwargs}

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), tuple(module.parameters()), materialize_grads=True)

    expected, expected_weights = module(x, x, x, **kwargs)
    wanted = gradients(expected)
    (handle,) = attach(module, example)
    assert handle.causal == ("attn_mask" in kwargs)
    for probing in (None, (BLOCK, BLOCK)):
        handle.probe_block_size = probing
        output, weights = module(x, x, x, **kwargs)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradients(output), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)
    handle.probe_block_size = None
    prune([handle])
    output, weights = module(x, x, x, **kwargs)
    found = gradients(output)
    detach(module)
    padding = torch.zeros(2, 1, 1, LENGTH)
    if "key_padding_mask" in kwargs:
        padding = padding.masked_fill(PADDING[:, None, None], -torch.inf)
    mask = float_mask(handle.pattern, padding)
    reference, reference_weights = module(
        x, x, x, attn_mask=mask, need_weights=need_weights, average_attn_weights=False
    )
    visible = slice(None) if "key_padding_mask" not in kwargs else slice(16)  # later rows may see padding alone
    rows = (slice(None), visible) if batch_first else visible
    torch.testing.assert_close(output[rows], reference[rows], atol=1e-5, rtol=1e-4)
    if need_weights:
        torch.testing.assert_close(weights[:, :, visible], reference_weights[:, :, visible], atol=1e-5, rtol=1e-4)
    if "key_padding_mask" not in kwargs:
        torch.testing.assert_close(found, gradients(reference), atol=1e-4, rtol=1e-4)


def test_separate_projections_and_unbatched_input():
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(WIDTH, HEADS, bias=False), inputs()[0]
    packed = module.in_proj_weight.detach().clone()
    module._qkv_same_embed_dim, module.in_proj_weight = False, None
    for name, part in zip("qkv", packed.chunk(3), strict=True):
        setattr(module, f"{name}_proj_weight", nn.Parameter(part))
    expected = module(x, x, x)
    attach(module)[0].probe_block_size = (BLOCK, BLOCK)
    torch.testing.assert_close(module(x, x, x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_encoder_in_eval_mode_uses_the_pattern_and_detach_restores_it(padded):
    model, x = encoder().eval(), inputs()
    kwargs = {"src_key_padding_mask": PADDING if padded else None}
    keys, expected = list(model.state_dict()), model(x, **kwargs)
    handles = attach(model)
    # Without nested tensors padded queries are computed, too.
    real = ~PADDING if padded else torch.ones_like(PADDING)
    torch.testing.assert_close(model(x, **kwargs)[real], expected[real], atol=1e-5, rtol=1e-4)
    prune(handles)
    pruned = model(x, **kwargs)
    assert (pruned - expected)[real].abs().max() > 1e-2
    torch.testing.assert_close(pruned[real], model.train()(x, **kwargs)[real], atol=1e-5, rtol=1e-4)
    assert list(model.state_dict()) == keys
    detach(model.eval())
    assert torch.equal(model(x, **kwargs), expected)
    assert model.use_nested_tensor
    assert handle_of(model.layers[0].self_attn) is None
    assert not model.layers[0].self_attn._forward_pre_hooks


def test_an_example_tells_causal_from_bidirectional_and_cross_from_self():
    model, x = encoder(), inputs()
    assert [layer.causal for layer in list_layers(model, {"src": x, "mask": CAUSAL})] == [True, True]
    assert [layer.causal for layer in list_layers(model, x)] == [False, False]
    whole = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True)
    problems = {layer.name: layer.problem for layer in list_layers(whole, (x, x[:, :5].clone()))}
    assert problems.pop("decoder.layers.0.multihead_attn") == "cross-attention"
    assert set(problems.values()) == {None}
    assert "decoder.layers.0.multihead_attn" not in find_layers(whole)


def test_without_an_example_the_first_probed_call_says_that_a_layer_is_causal():
    model = encoder()
    handle = attach(model)[0]
    assert not handle.causal
    handle.probe_block_size = (BLOCK, BLOCK)
    model(inputs(), CAUSAL)
    assert handle.causal
    assert handle.statistics.sums[0].triu(1).sum() == 0


class Positions(nn.Module):
    """DETR's self-attention: positions are added to queries and keys alone."""

    def __init__(self, batch_first):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.position = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x, mask=None):
        placed = x + self.position
        return self.attn(placed, placed, x, attn_mask=mask)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_with_other_tensors_of_the_same_length_is_pruned(batch_first):
    torch.manual_seed(0)
    model, x = Positions(batch_first), inputs(batch_first)
    (handle,) = attach(model, x)
    prune([handle])
    output = model(x)
    grads = torch.autograd.grad(output.square().sum(), tuple(model.parameters()))
    detach(model)
    expected = model(x, float_mask(handle.pattern))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), tuple(model.parameters())))


class Pooling(nn.Module):
    """SigLIP's pooling head: one query, without an example taken for self-attention."""

    def __init__(self):
        super().__init__()
        self.encoder, self.pool = encoder(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        x = self.encoder(x)
        return self.pool(x[:, :1], x, x)[0]


def test_other_lengths_at_the_first_probe_leave_a_layer_dense_and_name_it(caplog):
    torch.manual_seed(0)
    model, x = Pooling(), inputs()
    expected = model(x)
    pruner = AttentionPruner(ConstantSchedule(final=0.4), block_size=BLOCK)
    pruner.attach(model)
    pruner.probe(True)
    torch.testing.assert_close(model(x), expected)
    model(x)
    assert [record.getMessage() for record in caplog.records if "'pool': cross-attention" in record.getMessage()]
    assert sum("'pool'" in record.getMessage() for record in caplog.records) == 1
    pruner.probe(False)
    assert pruner.update(1).sparsity > 0.2
    assert "pool" not in pruner.patterns
    assert [layer.name for layer in list_layers(Pooling(), x) if layer.problem] == ["pool"]


def test_cross_attention_and_added_keys_are_refused():
    module, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), inputs()
    prune(attach(module))
    with pytest.raises(ValueError, match="own tokens"):
        module(x, x[:, :5], x[:, :5])
    with pytest.raises(ValueError, match="keys of its own"):
        attach(nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True))
