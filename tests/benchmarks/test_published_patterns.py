"""The patterns of others have the density that is asked for."""

import runpy
from pathlib import Path

import pytest
import torch

fixed_pattern = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "published_patterns.py"))["fixed_pattern"]

KINDS = ("sink_and_window", "bigbird", "longformer_dilated", "strided")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("density", [0.15, 0.3, 0.7, 1.0])
def test_every_head_keeps_the_density_and_the_diagonal(kind, causal, density):
    pattern = fixed_pattern(kind, 4, 512, 16, density=density, causal=causal)
    assert torch.allclose(1 - pattern.head_sparsity, torch.full((4,), density), atol=1 / int(pattern.possible.sum()))
    assert pattern.keep.diagonal(dim1=1, dim2=2).all()


def kept_distances(pattern, head=0, row=-1):
    kept = pattern.keep[head, row].nonzero()[:, 0]
    return sorted((len(pattern.keep[head, row]) - 1 - kept).tolist())


def test_sink_and_window():
    pattern = fixed_pattern("sink_and_window", 2, 512, 16, density=0.3)
    assert pattern.keep[:, :, 0].all()
    *window, sink = kept_distances(pattern)
    assert window == list(range(len(window)))
    assert sink == 31


def test_bigbird_has_random_blocks_that_differ_by_head_and_seed():
    one, two = (fixed_pattern("bigbird", 2, 512, 16, density=0.3, seed=seed) for seed in (0, 1))
    assert one.keep[:, :, 0].all()
    assert one.keep.diagonal(-1, 1, 2).all()
    assert not torch.equal(one.keep[0], one.keep[1])
    assert not torch.equal(one.keep, two.keep)
    assert torch.equal(one.keep, fixed_pattern("bigbird", 2, 512, 16, density=0.3, seed=0).keep)
    far = one.keep.tril(-8)[:, :, 4:]
    rows = far.sum((0, 2))
    assert rows[16:24].sum() > 0  # random blocks are not all in the last rows
    assert rows[24:].sum() > 0


def test_longformer_dilates_every_other_head():
    pattern = fixed_pattern("longformer_dilated", 2, 512, 16, density=0.3)
    near, far = (kept_distances(pattern, head)[:-1] for head in (0, 1))
    assert near == list(range(len(near)))
    assert far == list(range(0, 2 * len(far), 2))


def test_strided_keeps_a_window_and_every_nth_block():
    pattern = fixed_pattern("strided", 1, 512, 16, density=0.3)
    kept = kept_distances(pattern)
    assert set(range(0, 32, 6)) & set(kept) >= {0, 6, 12}
    assert {0, 1, 2} <= set(kept)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="density"):
        fixed_pattern("bigbird", 2, 64, 16, density=0.0)
    with pytest.raises(ValueError, match="kind"):
        fixed_pattern("window", 2, 64, 16, density=0.5)
