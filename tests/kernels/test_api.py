"""What every backend is spared: calls whose tensors do not fit together, and tables of another mode of autograd."""

import pytest
import torch

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
