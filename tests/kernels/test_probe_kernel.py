"""The probe kernel against torch: row mass, and the sums of `Influence`."""

import pytest
import torch

from sparse_prune import BlockPattern, Influence
from sparse_prune.kernels import AttentionOptions, probe_attention, probe_score
from support.cases import inputs, random_pattern

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from sparse_prune.kernels.triton import attend, launch, memory  # noqa: E402
from sparse_prune.kernels.triton.attend import influence, probe, probes  # noqa: E402

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


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernel notes nowhere is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def call(dtype=torch.float32, dim=24, length=LENGTH, heads=4):
    tensors = (t.detach().to(DEVICE, dtype) for t in inputs(q_len=length, kv_len=length, dim=dim, heads=heads))
    gradient = torch.randn(2, heads, length, dim, generator=torch.Generator(), dtype=torch.float64)
    return *tensors, (1e-4 * gradient).to(DEVICE)


def close(found, wanted, tolerance):
    assert wanted.sums.abs().max() > 0
    assert (found.sums - wanted.sums).abs().max() <= tolerance * wanted.sums.abs().max()
    assert torch.equal(found.counts, wanted.counts)
    assert found.kinds == wanted.kinds


def masks(options):
    return options.with_masks(lambda mask: mask.to(DEVICE))


CALLS = [(name, True) for name in OPTIONS] + [("plain", False), ("padding", False), ("rows of heads", False)]


def check_probe(query, key, block, causal, options):
    found = probe(query, key, block, causal=causal, options=masks(options))
    wanted = probe_attention(query.cpu().double(), key.cpu().double(), block, causal=causal, options=options)
    torch.testing.assert_close(found.sums.cpu(), wanted.sums, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.counts.cpu(), wanted.counts)


@pytest.mark.parametrize(("name", "causal"), CALLS)
def test_row_mass_of_dense_attention(name, causal):
    query, key, _, _ = call()
    check_probe(query, key, BLOCK, causal, OPTIONS[name])


@pytest.fixture
def launches(monkeypatch):
    """The configurations by which the probe is launched; as on a card that holds one stage."""
    inner, configs = attend.launch_probe, []

    def launched(query, key, block_q, config, *args):
        if config.num_stages > 1:
            raise OutOfResources(262144, 232448, "shared memory")
        configs.append(config)
        return inner(query, key, block_q, config, *args)

    monkeypatch.setattr(attend, "launch_probe", launched)
    monkeypatch.setattr(memory, "_STAGES", {})
    return configs


@pytest.mark.parametrize("heads_at_a_time", [3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_row_mass_of_blocks_that_several_programs_share(masked, heads_at_a_time, launches, monkeypatch):
    tiles = 4 if masked else 2
    of_a_head = 2 * 2 * tiles * 19 * (128 // tiles) * 4  # samples, blocks, tiles, key blocks, rows, bytes
    monkeypatch.setattr(launch, "_MOST_BYTES", heads_at_a_time * of_a_head)
    empty, noted = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: noted.append(a) or empty(*a, **k))
    query, key, _, _ = call(torch.float16, 16, length=300)
    mask = torch.rand(2, 4, 140, 300, generator=torch.Generator()) < 0.7 if masked else None
    check_probe(query[:, :, -140:], key, (128, 16), True, AttentionOptions(attn_mask=mask))
    assert [config.tile for config in launches] == [(128 // tiles, 16)]
    assert noted == [(heads_at_a_time, 2, 2 * tiles, 19, 1, 128 // tiles)]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="products are counted in the interpreter")
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_a_pair_of_blocks_is_multiplied_once_with_keys_and_once_with_values(density, monkeypatch):
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    inner, made = builder.create_dot, []
    monkeypatch.setattr(builder, "create_dot", lambda *args: made.append(1) or inner(*args))
    query, key, value, gradient = call(dim=16, length=64)
    pairs = 2 * 4 * (2 + 4)  # samples, heads, blocks of keys that two blocks of queries may see
    probe(query, key, BLOCK, causal=True)
    assert len(made) == pairs
    pattern = random_pattern(4, 64, 64, BLOCK, True, density)
    influence(query, key, value, gradient, BLOCK, causal=True, options=AttentionOptions(), pattern=pattern)
    assert len(made) == pairs + 2 * pairs


def test_the_probe_is_left_to_torch_where_its_kernel_would_spill():
    query = torch.zeros(1, 2, 256, 64, device=DEVICE)
    assert probes(query.half(), (128, 128))
    assert not probes(query, (64, 64))
    assert probes(query, (32, 32))
    assert not probes(query.half(), (256, 256))
    assert not probes(query.half(), (48, 48))
    with pytest.raises(ValueError, match="16 to 32 for the Triton probe in torch.float32, got .64, 64.*probe_blocks"):
        probe(query, query, (64, 64), causal=True)


def test_logits_that_are_not_finite_show_in_the_probe():
    query, key, _, _ = call()
    found = probe(query * torch.nan, key, BLOCK, causal=True)
    assert not torch.isfinite(found.sums).all()
    assert found.trimmed(BLOCK).sums.shape == found.sums.shape


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize(("name", "causal"), CALLS)
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
    query, key, value, gradient = call(torch.float16, dim)
    pattern = random_pattern(4, LENGTH, LENGTH, block, True, 0.6)
    given = {"causal": True, "options": AttentionOptions(), "pattern": pattern}
    wanted = probe_score(
        Influence(), *(t.cpu().float() for t in (query, key, value)), block, gradient=gradient.cpu(), **given
    )
    close(influence(query, key, value, gradient, block, **given), wanted, 1e-2)


def exact(query, key, value, gradient, block, keep):
    """The sums of a causal call by their definition, in float64."""
    query, key, value, gradient = (t.double().cpu() for t in (query, key, value, gradient))
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    length, blocks = query.shape[2], keep.shape[2]
    kept = keep.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :length, :length]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    logits = (query @ key.mT / query.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
    weights = (logits - logits.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)).exp()
    weights = weights * (kept & seen).any(-1, keepdim=True)
    by_key = gradient @ value.mT
    change = weights * (by_key - (weights * by_key * kept).sum(-1, keepdim=True))

    def per_block(part):
        wide = torch.nn.functional.pad(part, (0, blocks * block[1] - length))
        return wide.unflatten(-1, (blocks, block[1])).sum(-1)

    mass, own = per_block(weights), keep.repeat_interleave(block[0], 1)[:, :length]
    there = per_block((kept & seen).double()) > 0
    rise = -per_block(change) / torch.where(own, (1 - mass).clamp_min(1e-3), 1 + mass)
    rise = rise.masked_fill(there.sum(-1, keepdim=True) <= there.int(), 0.0)
    rise = torch.nn.functional.pad(rise, (0, 0, 0, keep.shape[1] * block[0] - length))
    return rise.unflatten(2, (keep.shape[1], block[0])).sum((0, 3))


@pytest.mark.parametrize("launches", [1, 4])
def test_many_blocks_and_rows_that_one_of_them_holds_have_the_sums_of_their_definition(launches, monkeypatch):
    """The share of a row's mass outside of a sink is what is left of a difference: its rounding is divided by it."""
    if launches > 1:
        monkeypatch.setattr(launch, "_MOST_BYTES", 1)
    query, key, value, gradient = call(length=333)
    query[..., 0] += 4.0
    key[:, :, 0] = 10.0 * torch.eye(24)[0]
    keep = random_pattern(4, 333, 333, BLOCK, True, 0.6).keep.clone()
    keep[:, :, 0] = True
    pattern = BlockPattern(keep, BLOCK, True, 333, 333)
    found = influence(query, key, value, gradient, BLOCK, causal=True, options=AttentionOptions(), pattern=pattern)
    wanted = exact(query, key, value, gradient, BLOCK, keep)
    assert (found.sums[0].cpu() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_what_the_kernel_does_not_take_is_refused():
    query, key, value, gradient = call()
    with pytest.raises(ValueError, match="`block_size` must be powers of two"):
        influence(query, key, value, gradient, (24, 24), causal=True, options=AttentionOptions())
