"""What serves a pattern that still moves: the kept blocks alone, or on a CPU a mask where that is faster."""

from dataclasses import replace

import pytest
import torch

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import BACKENDS, AttentionOptions, check_trains, moving_backend


def chosen(batch, heads, length, dim, block, density, *, causal=True, dtype=torch.float32, device="cpu", **options):
    query = torch.empty(batch, heads, length, dim, dtype=dtype, device=device)
    pattern = random_pattern(heads, length, block, density=density, causal=causal)
    return moving_backend(query, pattern, AttentionOptions(**options))


def padding(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize(
    ("density", "options", "wanted"),
    [
        (0.5, {}, "sdpa"),
        (0.3, {}, "gather"),
        (0.7, {"key_mask": padding(4, 512)}, "sdpa"),
        (0.5, {"key_mask": padding(4, 512)}, "gather"),
        (0.3, {"key_mask": padding(4, 512), "dropout_p": 0.1, "seed": 0}, "sdpa"),
        (0.15, {"key_mask": padding(4, 512), "dropout_p": 0.1, "seed": 0}, "gather"),
        (0.3, {"dtype": torch.bfloat16}, "sdpa"),
    ],
)
def test_a_short_encoder_is_masked_until_little_is_left(density, options, wanted):
    """The faster one of MiniLM's calls in benchmarks/results/moving_backend.json."""
    assert chosen(4, 12, 512, 32, 32, density, causal=False, **options) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_long_causal_sequence_is_gathered(dtype):
    assert chosen(1, 9, 2048, 64, 64, 0.9, dtype=dtype) == "gather"


def test_a_mask_that_would_fill_the_memory_is_not_made():
    assert chosen(8, 4, 512, 64, 32, 0.9, causal=False, key_mask=padding(8, 512)) == "sdpa"
    assert chosen(32, 4, 512, 64, 32, 0.9, causal=False, key_mask=padding(32, 512)) == "gather"
    assert chosen(1, 16, 2048, 64, 16, 0.9, causal=False) == "gather"


def test_what_sdpa_cannot_do_is_gathered():
    assert chosen(4, 12, 512, 32, 32, 0.9, causal=False, softcap=20.0) == "gather"


def test_the_measured_costs_are_of_a_cpu_alone():
    assert chosen(4, 12, 512, 32, 32, 0.9, causal=False, device="meta") == "gather"


def test_no_sequence_at_all():
    assert chosen(0, 12, 512, 32, 32, 0.9, causal=False) in BACKENDS


@pytest.mark.parametrize(("density", "wanted"), [(0.9, "sdpa"), (0.1, "gather")])
def test_a_layer_whose_pattern_moves_takes_it(monkeypatch, density, wanted):
    taken = []
    for name, known in list(BACKENDS.items()):
        watched = replace(known, attend=lambda *call, known=known: taken.append(known.name) or known.attend(*call))
        monkeypatch.setitem(BACKENDS, name, watched)
    layer = PrunableAttention("layer", 2, 2, causal=False, mode="masked")
    layer.pattern = random_pattern(2, 256, 16, density=density, causal=False)
    query, key, value = torch.randn(3, 4, 2, 256, 16)
    found = layer.attend(query, key, value, AttentionOptions(), dense=lambda: pytest.fail("the layer is pruned"))
    assert taken == [wanted]
    exact = BACKENDS["reference"].attend(query, key, value, layer.pattern, AttentionOptions())
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_backend_that_cannot_train_on_a_cpu_is_refused(monkeypatch, backend):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_trains(backend, torch.device("cuda", 0))
    if backend in ("flex", "triton"):
        with pytest.raises(ValueError, match=f"`backend='{backend}'` must train on a CUDA device, got cpu. Use 'auto'"):
            check_trains(backend, torch.device("cpu"))
    else:
        check_trains(backend, torch.device("cpu"))
