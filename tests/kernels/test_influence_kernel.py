"""The kernel of `Influence` against its sums in torch."""

import pytest
import torch

from sparse_prune import Influence
from sparse_prune.kernels import AttentionOptions, probe_score
from support.cases import inputs, random_pattern

pytest.importorskip("triton")
from sparse_prune.kernels.triton.attend import influence  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, BLOCK = 70, (32, 16)
OPTIONS = {
    "plain": AttentionOptions(),
    "scale and soft cap": AttentionOptions(scale=0.7, softcap=2.0),
    "padding": AttentionOptions(key_mask=torch.arange(LENGTH) >= torch.tensor([[5], [40]])),
    "mask": AttentionOptions(attn_mask=torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator()) < 0.7),
    "rows of heads": AttentionOptions(
        attn_mask=(torch.arange(LENGTH) // 20 != torch.arange(4)[:, None])[None, ..., None].expand(2, 4, LENGTH, LENGTH)
    ),
    "window": AttentionOptions(window=19),
    "documents": AttentionOptions(documents=(torch.arange(LENGTH) >= 33).int().expand(2, -1)),
}


def call(dtype=torch.float32, dim=24, block=BLOCK, heads=4):
    tensors = (t.detach().to(DEVICE, dtype) for t in inputs(q_len=LENGTH, kv_len=LENGTH, dim=dim, heads=heads))
    gradient = torch.randn(2, heads, LENGTH, dim, generator=torch.Generator(), dtype=torch.float64)
    return *tensors, (1e-4 * gradient).to(DEVICE)


def close(found, wanted, tolerance):
    assert wanted.sums.abs().max() > 0
    assert (found.sums - wanted.sums).abs().max() <= tolerance * wanted.sums.abs().max()
    assert torch.equal(found.counts, wanted.counts)
    assert found.kinds == wanted.kinds


def masks(options):
    return options.with_masks(lambda mask: mask.to(DEVICE))


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize(
    ("name", "causal"), [(name, True) for name in OPTIONS] + [("plain", False), ("padding", False)]
)
def test_kept_and_pruned_blocks_have_the_sums_of_torch(name, causal, density):
    query, key, value, gradient = call()
    pattern = None if density is None else random_pattern(4, LENGTH, LENGTH, BLOCK, causal, density)
    given = {"causal": causal, "options": masks(OPTIONS[name]), "pattern": pattern}
    wanted = probe_score(
        Influence(), *(t.cpu() for t in (query, key, value)), BLOCK, gradient=gradient.cpu(),
        **given | {"options": OPTIONS[name]},
    )  # fmt: skip
    found = influence(query, key, value, gradient, BLOCK, **given)
    close(found, wanted, 1e-4)


@pytest.mark.parametrize(("dim", "block"), [(64, (128, 32)), (128, (64, 32)), (16, (16, 64))])
def test_half_precision_tiles_and_heads(dim, block):
    query, key, value, gradient = call(torch.float16, dim, block)
    pattern = random_pattern(4, LENGTH, LENGTH, block, True, 0.6)
    given = {"causal": True, "options": AttentionOptions(), "pattern": pattern}
    wanted = probe_score(
        Influence(), *(t.cpu().float() for t in (query, key, value)), block, gradient=gradient.cpu(), **given
    )
    close(influence(query, key, value, gradient, block, **given), wanted, 1e-2)


def test_what_the_kernel_does_not_take_is_refused():
    query, key, value, gradient = call()
    with pytest.raises(ValueError, match="`block_size` must be powers of two"):
        influence(query, key, value, gradient, (24, 24), causal=True, options=AttentionOptions())
