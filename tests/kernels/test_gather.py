import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention, documents_from_cu_seqlens
from support.cases import inputs, random_pattern, run


def assert_matches_reference(tensors, pattern, options=None):
    for found, wanted in zip(
        run(tensors, pattern, options, "gather"), run(tensors, pattern, options, "reference"), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [8, (8, 4), (4, 8), 64])
@pytest.mark.parametrize("length", [1, 31, 32, 37])
def test_output_and_gradients_match_the_reference(causal, block, length):
    pattern = random_pattern(4, length, length, block, causal)
    assert_matches_reference(inputs(q_len=length, kv_len=length), pattern)


def test_fewer_queries_than_keys():
    assert_matches_reference(inputs(q_len=21, kv_len=37), random_pattern(4, 21, 37, 8, True))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_group_size(kv_heads):
    assert_matches_reference(inputs(kv_heads=kv_heads), random_pattern(4, 37, 37, 8, True))


def _mask():
    return torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(key_mask=torch.arange(37) < torch.tensor([[20], [37]])),
        AttentionOptions(key_mask=torch.arange(37) >= torch.tensor([[9], [0]])),
        AttentionOptions(attn_mask=_mask()),
        AttentionOptions(documents=torch.arange(37) // torch.tensor([[20], [5]])),
        AttentionOptions(softcap=1.5),
        AttentionOptions(scale=0.7),
        AttentionOptions(dropout_p=0.3, seed=5),
        AttentionOptions(dropout_p=0.3, seed=2**40, softcap=2.0, attn_mask=_mask(), scale=0.5),
    ],
    ids=["right padding", "left padding", "mask", "documents", "softcap", "scale", "dropout", "all"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_options_match_the_reference(options, causal):
    assert_matches_reference(inputs(), random_pattern(4, 37, 37, 8, causal, 0.7), options)


@pytest.mark.parametrize("q_len", [21, 37])
def test_window_and_documents_of_a_causal_call(q_len):
    documents = torch.arange(37) // torch.tensor([[20], [5]])
    for options in (AttentionOptions(window=9), AttentionOptions(window=30, documents=documents)):
        assert_matches_reference(inputs(q_len=q_len), random_pattern(4, q_len, 37, 8, True, 0.8), options)


def test_the_reference_itself_hides_what_window_and_documents_hide():
    """By hand: one head, uniform weights, values that name their position."""
    query = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    value = torch.arange(4.0, dtype=torch.float64).view(1, 1, 4, 1).expand(-1, -1, -1, 2)
    dense = BlockPattern.dense(1, 4, 4, 4, True)
    seen = block_sparse_attention(query, query, value, dense, AttentionOptions(window=2), backend="reference")
    assert seen[0, 0, :, 0].tolist() == [0.0, 0.5, 1.5, 2.5]
    packed = AttentionOptions(documents=torch.tensor([[0, 0, 1, 1]]))
    seen = block_sparse_attention(query, query, value, dense, packed, backend="reference")
    assert seen[0, 0, :, 0].tolist() == [0.0, 0.5, 2.0, 2.5]


@pytest.mark.parametrize(
    ("options", "causal", "message"),
    [
        ({"window": 0}, True, "`window` must be at least 1"),
        ({"window": 4}, False, "`window` is for causal"),
        ({"documents": torch.zeros(2, 36, dtype=torch.int32)}, True, "`documents` must have shape \\(2, 37\\)"),
    ],
)
def test_wrong_options_are_refused(options, causal, message):
    with pytest.raises(ValueError, match=message):
        run(inputs(), random_pattern(4, 37, 37, 8, causal), AttentionOptions(**options), "gather")


def test_documents_from_cumulative_lengths():
    found = documents_from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5)
    assert found.tolist() == [[0, 0, 2, 2, 2]]
    for wrong in ([0, 2], [1, 5], [0, 3, 2, 5], [5]):
        with pytest.raises(ValueError, match="`cu_seqlens` must ascend from 0 to 5"):
            documents_from_cu_seqlens(torch.tensor(wrong), 5)


def test_dropout_depends_on_the_seed_only():
    tensors, pattern = inputs(), random_pattern(4, 37, 37, 8, True)
    one, same, other = (run(tensors, pattern, AttentionOptions(dropout_p=0.5, seed=s), "gather")[0] for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


def test_gradients_of_gradients_are_refused():
    """They would be wrong in silence: the backward pass takes the log-sum-exp for a constant."""
    tensors = inputs()
    output = block_sparse_attention(*tensors, random_pattern(4, 37, 37, 8, True), backend="gather")
    grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in grads).backward()


def test_empty_rows_give_zeros_and_zero_gradients():
    pattern = BlockPattern(torch.zeros(4, 5, 5, dtype=torch.bool), (8, 8), True, 37, 37)
    for tensor in run(inputs(), pattern, None, "gather"):
        assert tensor.abs().max() == 0
    mask = torch.zeros(2, 37, dtype=torch.bool)
    for tensor in run(inputs(), random_pattern(4, 37, 37, 8, True), AttentionOptions(key_mask=mask), "gather"):
        assert tensor.abs().max() == 0


def test_pruned_blocks_are_never_read():
    pattern = random_pattern(4, 40, 40, 8, True)
    keep = pattern.keep.clone()
    keep[:, :, 2] = False
    query, key, value = inputs(q_len=40, kv_len=40)
    with torch.no_grad():
        key[:, :, 16:24] = torch.nan
        value[:, :, 16:24] = torch.nan
    for tensor in run((query, key, value), BlockPattern(keep, (8, 8), True, 40, 40), None, "gather"):
        assert torch.isfinite(tensor).all()


def test_same_input_same_bits_and_strides_do_not_matter():
    query, key, value = inputs(dtype=torch.float32)
    pattern = random_pattern(4, 37, 37, 8, True)
    one, two = run((query, key, value), pattern, None, "gather"), run((query, key, value), pattern, None, "gather")
    turned = tuple(
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (query, key, value)
    )
    three = run(turned, pattern, None, "gather")
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype):
    """Judged by the float64 reference on the same rounded inputs, against plain torch operations in that dtype."""
    low = tuple(t.detach().to(dtype).requires_grad_() for t in inputs(q_len=96, kv_len=96))
    exact = tuple(t.detach().double().requires_grad_() for t in low)
    pattern = random_pattern(4, 96, 96, 16, True, 0.7)
    truth = run(exact, pattern, None, "reference")
    eager, found = run(low, pattern, None, "reference"), run(low, pattern, None, "gather")
    for t, e, f in zip(truth, eager, found, strict=True):
        assert f.dtype == dtype
        allowed = 1.5 * (e.double() - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()
        assert (f.double() - t).abs().max() <= allowed


def test_autocast_takes_its_dtype():
    tensors, pattern = inputs(dtype=torch.float32), random_pattern(4, 37, 37, 8, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block_sparse_attention(*tensors, pattern, backend="gather")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@given(
    st.integers(1, 40),
    st.integers(0, 9),
    st.sampled_from([4, 8, (8, 4), (4, 8)]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_any_pattern_matches_the_reference(q_len, extra, block, causal, density, seed):
    pattern = random_pattern(4, q_len, q_len + extra, block, causal, density, seed)
    assert_matches_reference(inputs(q_len=q_len, kv_len=q_len + extra, seed=seed), pattern)
