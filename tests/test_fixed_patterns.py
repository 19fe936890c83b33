import pytest
import torch

from sparse_prune.fixed_patterns import random_pattern


@pytest.mark.parametrize("block_size", [8, (8, 16), (16, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_random_patterns_keep_sink_and_diagonal(block_size, causal):
    pattern = random_pattern(4, 253, block_size, density=0.5, causal=causal)
    assert pattern.sparsity == pytest.approx(0.5, abs=0.02)
    assert pattern.keep[:, :, 0].all()
    rows, (block_q, block_kv) = torch.arange(pattern.keep.shape[1]), pattern.block_size
    assert pattern.keep[:, rows, rows * block_q // block_kv].all()
    assert (pattern.keep[0] != pattern.keep[1]).any()
    assert (pattern.keep != random_pattern(4, 253, block_size, density=0.5, causal=causal, seed=1).keep).any()


@pytest.mark.parametrize(
    ("length", "density", "achieved"), [(2048, 0.05, 31 / 136), (4096, 0.0, 63 / 528), (4096, 1.0, 1.0)]
)
def test_random_patterns_come_as_near_to_the_density_as_sink_and_diagonal_let_them(length, density, achieved):
    pattern = random_pattern(16, length, 128, density=density)
    assert 1.0 - pattern.sparsity == pytest.approx(achieved)
    assert pattern.keep.diagonal(dim1=1, dim2=2).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="density"):
        random_pattern(2, 64, 16, density=1.5)
