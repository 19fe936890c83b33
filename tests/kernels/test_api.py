"""What every backend is spared: calls whose tensors do not fit together, and tables of another mode of autograd."""

import pytest
import torch

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from support.cases import inputs, random_pattern, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["key_mask", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_masks_that_are_not_boolean_are_refused(name, dtype):
    """A tokenizer's mask holds int64 ones: read as bytes, seven of eight would hide a token."""
    with pytest.raises(TypeError, match=f"`{name}` must be boolean.*got {dtype}.*`mask.bool\\(\\)`"):
        AttentionOptions(**{name: torch.ones(1, 37, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_documents_that_are_not_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"`documents` must hold integers, got {dtype}.*int\\(\\)"):
        AttentionOptions(documents=torch.ones(1, 37, dtype=dtype))


@pytest.mark.parametrize(("causal", "q_len", "kv_len"), [(True, 25, 10), (False, 25, 10), (False, 10, 25)])
def test_documents_of_other_tokens_than_the_queries_are_refused(causal, q_len, kv_len):
    query, key = torch.randn(1, 4, q_len, 16), torch.randn(1, 4, kv_len, 16)
    options = AttentionOptions(documents=torch.zeros(1, kv_len, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"must number all queries, got {q_len} queries and {kv_len} keys in a"):
        block_sparse_attention(query, key, key, random_pattern(4, q_len, kv_len, 16, causal), options, backend="gather")


def mixed():
    query, key, value = (t.detach().float() for t in inputs(dim=16))
    return query, key, value.bfloat16()


def test_mixed_dtypes_are_refused():
    """Rotary embeddings in float32 beside values in bfloat16, say."""
    with pytest.raises(ValueError, match="one dtype, got torch.float32, torch.float32, torch.bfloat16. Cast"):
        block_sparse_attention(*mixed(), random_pattern(4, 37, 37, 16, True))


def test_autocast_makes_one_dtype_of_mixed_ones():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block_sparse_attention(*mixed(), random_pattern(4, 37, 37, 16, True))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["gather", "reference", "sdpa", "triton"])
@pytest.mark.parametrize("made_there", [False, True])
def test_what_validation_built_in_inference_mode_serves_training(backend, made_there):
    """`Trainer.validate` runs in inference mode; autograd saves no tensor that was made there."""
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = tuple(t.detach().to(DEVICE, torch.float32).requires_grad_() for t in inputs(dim=16))
    pattern = random_pattern(4, 37, 37, 16, True)
    with torch.inference_mode():
        if made_there:
            pattern = random_pattern(4, 37, 37, 16, True)
        block_sparse_attention(*tensors, pattern, backend=backend)
    found = run(tensors, pattern, None, backend)
    wanted = run(tensors, random_pattern(4, 37, 37, 16, True), None, "reference")
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["gather", "sdpa", "triton"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(24, 16), (16, 24)])
def test_values_of_another_size_than_keys(backend, key_dim, value_dim):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 32, dim, generator=generator, requires_grad=True)
        for heads, dim in ((2, key_dim), (1, key_dim), (1, value_dim))
    )
    keep = torch.tensor([[[True, False], [True, True]], [[True, False], [False, True]]])
    pattern = BlockPattern(keep, (16, 16), True, 32, 32)
    mask = keep.repeat_interleave(16, 1).repeat_interleave(16, 2) & torch.ones(32, 32, dtype=torch.bool).tril()
    logits = (query @ key.transpose(2, 3) * key_dim**-0.5).masked_fill(~mask, -torch.inf)
    expected = logits.softmax(-1) @ value
    output = block_sparse_attention(query, key, value, pattern, backend=backend)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    grad = torch.randn(expected.shape, generator=generator)
    for got, want in zip(*(torch.autograd.grad(o, (query, key, value), grad) for o in (output, expected)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["gather", "sdpa", "triton", "reference", "flex"])
@pytest.mark.parametrize("sizes", [(0, 2, 20, 20), (1, 0, 20, 20), (1, 2, 0, 0), (1, 2, 20, 0)])
def test_calls_without_sequences_heads_tokens_or_keys_give_zeros(backend, sizes):
    batch, heads, q_len, kv_len = sizes
    query = torch.randn(batch, heads, q_len, 16, requires_grad=True)
    key = torch.randn(batch, heads, kv_len, 16)
    pattern = BlockPattern.dense(heads, q_len, kv_len, 16, causal=False)
    output = block_sparse_attention(query, key, key, pattern, backend=backend)
    assert output.shape == query.shape
    assert output.eq(0).all()
    output.sum().backward()
    assert query.grad.eq(0).all()


def test_forward_mode_is_refused_by_triton_and_right_in_the_reference():
    query, tangent = torch.randn(2, 1, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    pattern = BlockPattern.dense(1, 20, 20, 16, causal=True)

    def loss(query, backend):
        return block_sparse_attention(query, query, query, pattern, backend=backend).square().sum()

    _, slope = torch.func.jvp(lambda q: loss(q, "reference"), (query,), (tangent,))
    step = 1e-3
    difference = (loss(query + step * tangent, "reference") - loss(query - step * tangent, "reference")) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-2, atol=1e-2)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.func.jvp(lambda q: loss(q, "triton"), (query,), (tangent,))
