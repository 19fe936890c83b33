"""The decode kernels against the masked reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.reference import masked_attention
from support.cases import inputs, random_pattern

pytest.importorskip("triton")
from sparse_prune.kernels.triton.attend import decode, decodes  # noqa: E402
from sparse_prune.kernels.triton.configs import decode_config  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: t.fill_(torch.nan) if (t := empty(*a, **k)).is_floating_point() else t
    )


def check(pattern, q_len, kv_len, options=None, *, heads=4, kv_heads=2, dim=16, dtype=torch.float32, batch=2):
    options = options or AttentionOptions()
    made = inputs(batch, heads, kv_heads, q_len, kv_len, dim)
    query, key, value = (t.detach().to(DEVICE, dtype) for t in made)
    found = decode(query, key, value, pattern, options)
    mask = pattern.token_mask(q_len, kv_len, DEVICE)[None]
    truth = masked_attention(query.double(), key.double(), value.double(), mask, options)
    eager = masked_attention(query, key, value, mask, options)
    allowed = 3.0 * (eager.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1.0)
    assert found.shape == query.shape
    assert (found.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kv_len", [1, 16, 63, 64, 65, 150])
def test_one_query_at_every_length(kv_heads, kv_len):
    """Shorter and longer than the pattern's own 64 tokens."""
    check(random_pattern(4, 64, 64, 16, True), 1, kv_len, kv_heads=kv_heads)


@pytest.mark.parametrize("q_len", [2, 5, 16])
def test_few_queries_over_a_block_border(q_len):
    check(random_pattern(4, 64, 64, 16, True), q_len, 68)


@pytest.mark.parametrize("dim", [16, 24, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_sizes(dim, dtype):
    check(random_pattern(4, 64, 64, (32, 16), True), 1, 90, dim=dim, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(key_mask=(torch.arange(68) >= torch.tensor([[40], [0]])).to(DEVICE)),
        AttentionOptions(
            attn_mask=(torch.rand(2, 1, 3, 68, generator=torch.Generator().manual_seed(3)) < 0.6).to(DEVICE)
        ),
        AttentionOptions(documents=(torch.arange(68) >= torch.tensor([[30], [67]])).int().to(DEVICE)),
        AttentionOptions(window=20),
        AttentionOptions(softcap=1.5, scale=0.7),
    ],
    ids=["left padding", "mask", "documents", "window", "softcap"],
)
def test_options(options):
    check(random_pattern(4, 64, 64, 16, True, 0.8), 3, 68, options)


def test_nothing_to_attend_to_gives_zeros():
    pattern = random_pattern(4, 64, 64, 16, True, 0.0)
    query, key, value = (t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=1, kv_len=64, dim=16))
    assert decode(query, key, value, pattern, AttentionOptions()).abs().max() == 0


def test_pruned_blocks_are_never_read():
    pattern = random_pattern(4, 64, 64, 16, True)
    kept = pattern.keep_rows(3, 4, 4).view(2, 2, 4).any(1)  # per key head
    query, key, value = (t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=1, kv_len=64, dim=16))
    hidden = ~kept.repeat_interleave(16, 1).to(DEVICE)
    assert hidden.any()
    key[:, hidden], value[:, hidden] = torch.nan, torch.nan
    assert torch.isfinite(decode(query, key, value, pattern, AttentionOptions())).all()


@given(st.integers(1, 8), st.integers(0, 100), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_any_pattern(q_len, extra, density, seed):
    check(random_pattern(4, 48, 48, (16, 32), True, density, seed), q_len, q_len + extra)


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "tile", "warps"),
    [
        (1, 128, torch.bfloat16, (16, 64), 4),
        (33, 128, torch.bfloat16, (64, 32), 8),
        (128, 128, torch.bfloat16, (128, 32), 8),
        (64, 256, torch.bfloat16, (64, 32), 8),
        (32, 128, torch.float32, (32, 32), 4),
    ],
)
def test_a_large_pack_gets_more_warps_and_smaller_tiles(rows, head_dim, dtype, tile, warps):
    """With four warps 128 rows spilled tens of kilobytes and took minutes to compile."""
    config = decode_config(rows, head_dim, dtype, (128, 128))
    assert (config.tile, config.num_warps) == (tile, warps)


def test_a_layer_masks_what_has_too_many_rows_for_the_kernel():
    query, key = torch.zeros(1, 8, 17, 256), torch.zeros(1, 2, 64, 256)
    assert not decodes(query.bfloat16(), key)
    assert decodes(query[:, :, :16].bfloat16(), key)
    assert decodes(query[..., :128].bfloat16(), key)
    assert not decodes(query[:, :, :16], key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decodes(query[:, :, :16], key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": AttentionOptions(dropout_p=0.1, seed=1)}, "`dropout_p` 0 in decoding"),
        ({"causal": False}, "`pattern` must be causal"),
        ({"q_len": 17}, "at most 32 rows.*float32 in decoding, got 34.*fewer queries"),
        ({"block": 8}, "factor 16"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    pattern = random_pattern(4, 96, 96, change.get("block", 16), change.get("causal", True))
    q_len = change.get("q_len", 1)
    query, key, value = (t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=q_len, kv_len=96, dim=16))
    with pytest.raises(ValueError, match=message):
        decode(query, key, value, pattern, change.get("options", AttentionOptions()))


def test_generation_with_swapped_layers_decodes_by_the_kernel(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparse_prune.attention import attach
    from sparse_prune.kernels.triton import attend

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5)).eval().to(DEVICE)
    handles, calls = attach(model), []
    inner = attend.decode
    monkeypatch.setattr(attend, "decode", lambda *a: calls.append(a) or inner(*a))
    ids = torch.randint(3, 50, (2, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    found = []
    for backend in ("triton", "gather"):
        for handle in handles:
            handle.pattern, handle.mode, handle.backend = random_pattern(4, 32, 32, 16, True, 0.7), "sparse", backend
        scores = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        ).logits  # fmt: skip
        found.append(torch.stack(scores))
    assert len(calls) == 2 * 5
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
