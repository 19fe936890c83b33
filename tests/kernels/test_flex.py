"""FlexAttention as a second opinion on the reference, and as a backend."""

import pytest
import torch
from cases import inputs, random_pattern

from sparse_prune.kernels import AttentionOptions, block_sparse_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def compare(pattern, options=None, q_len=37, kv_len=37):
    tensors = tuple(t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=q_len, kv_len=kv_len, dim=16))
    found = block_sparse_attention(*tensors, pattern, options, backend="flex")
    wanted = block_sparse_attention(*(t.double() for t in tensors), pattern, options, backend="reference")
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, (32, 16), (16, 32)])
def test_patterns(causal, block):
    compare(random_pattern(4, 37, 37, block, causal))


def test_fewer_queries_than_keys():
    compare(random_pattern(4, 21, 37, 16, True), q_len=21)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(key_mask=(torch.arange(37) >= torch.tensor([[9], [0]])).to(DEVICE)),
        AttentionOptions(documents=(torch.arange(37) >= torch.tensor([[9], [0]])).int().to(DEVICE)),
        AttentionOptions(window=5),
        AttentionOptions(softcap=1.5, scale=0.5),
    ],
    ids=["padding", "documents", "window", "softcap"],
)
def test_options(options):
    compare(random_pattern(4, 37, 37, 16, True), options)


def test_rows_without_a_key_are_zero():
    compare(random_pattern(4, 37, 37, 16, True, 0.0))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="`dropout_p` 0.*'triton' or 'gather'"):
        block_sparse_attention(
            *inputs(), random_pattern(4, 37, 37, 8, True), AttentionOptions(dropout_p=0.1, seed=1), backend="flex"
        )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU it has gradients")
def test_gradients_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="no gradients on a CPU.*gather"):
        block_sparse_attention(*inputs(), random_pattern(4, 37, 37, 8, True), backend="flex")
