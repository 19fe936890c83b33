import pytest
import torch

from sparse_prune.attention import attach, chunks
from sparse_prune.attention.chunks import attend_chunk
from sparse_prune.cache import PatternCache
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention

LENGTH = 150
KINDS = ["plain", "padding", "mask", "causal mask", "mask of keys", "documents", "window", "cap"]


def options_of(kind, q_len):
    generator = torch.Generator().manual_seed(1)
    if kind == "padding":
        return AttentionOptions(key_mask=torch.rand(2, LENGTH, generator=generator) > 0.3)
    if kind == "mask":
        return AttentionOptions(attn_mask=(torch.rand(2, 1, LENGTH, LENGTH, generator=generator) > 0.3)[:, :, -q_len:])
    if kind == "causal mask":  # of transformers, with padding
        real = torch.arange(LENGTH) >= torch.tensor([[0], [20]])
        return AttentionOptions(attn_mask=(real[:, None] & torch.ones(LENGTH, LENGTH).bool().tril())[:, None, -q_len:])
    if kind == "mask of keys":
        return AttentionOptions(attn_mask=torch.rand(1, 4, 1, LENGTH, generator=generator) > 0.3)
    if kind == "documents":
        return AttentionOptions(documents=(torch.arange(LENGTH) // 60).expand(2, -1))
    return {"plain": AttentionOptions(), "window": AttentionOptions(window=40), "cap": AttentionOptions(softcap=3.0)}[
        kind
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("q_len", [150, 80, 54, 33])
def test_a_chunk_computes_the_last_rows_of_the_whole(kind, block, q_len):
    torch.manual_seed(0)
    shapes = (4, 16), (2, 16), (2, 24)
    query, key, value = (torch.randn(2, heads, LENGTH, dim, dtype=torch.float64) for heads, dim in shapes)
    pattern = random_pattern(4, LENGTH, block, density=0.5)
    chunk, whole = options_of(kind, q_len), options_of(kind, LENGTH)
    expected = block_sparse_attention(query, key, value, pattern, whole, backend="reference")[:, :, -q_len:]
    found = attend_chunk(query[:, :, -q_len:], key, value, pattern, chunk)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "pairs"), [("causal mask", False), ("mask", True), ("mask of keys", True)])
def test_a_mask_that_hides_later_keys_alone_is_not_read_for_every_block(kind, pairs, monkeypatch):
    given = []
    monkeypatch.setattr(
        chunks,
        "block_sparse_attention",
        lambda *args, **kw: given.append(args[4]) or block_sparse_attention(*args, **kw),
    )
    query, key, value = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    attend_chunk(query[:, :, -54:], key, value, random_pattern(4, LENGTH, 16, density=0.5), options_of(kind, 54))
    assert (given[0].attn_mask is not None) == pairs
    assert (given[0].key_mask is not None) != pairs  # of padding


@pytest.mark.parametrize("kind", ["plain", "padding", "mask", "window"])
def test_a_chunk_is_computed_by_the_triton_kernel_where_that_is_chosen(kind, monkeypatch):
    """On a GPU; a chunk has more keys than queries, and its first rows stand for queries before it."""
    pytest.importorskip("triton")
    monkeypatch.setattr(chunks, "moving_backend", lambda *given: "triton")
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, LENGTH, 16) for heads in (4, 2, 2))
    pattern, q_len = random_pattern(4, LENGTH, 16, density=0.5), 54
    expected = block_sparse_attention(query, key, value, pattern, options_of(kind, LENGTH), backend="reference")
    found = attend_chunk(query[:, :, -q_len:], key, value, pattern, options_of(kind, q_len))
    torch.testing.assert_close(found, expected[:, :, -q_len:], atol=2e-5, rtol=1e-5)


def test_a_chunk_goes_on_where_the_pattern_was_learned_on_less():
    query, key, value = (torch.randn(1, 2, LENGTH, 16, dtype=torch.float64) for _ in range(3))
    pattern = random_pattern(2, 96, 16, density=0.5)
    continued = pattern.at(LENGTH, LENGTH)
    expected = block_sparse_attention(query, key, value, continued, backend="reference")[:, :, 60:]
    found = attend_chunk(query[:, :, 60:], key, value, pattern, AttentionOptions())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cache", ["pattern", "dynamic"])
def test_caches_take_chunks_longer_than_a_block(tiny_model, cache, monkeypatch):
    from transformers import DynamicCache

    from sparse_prune.attention import cached_keys, layer
    from sparse_prune.recipes.causal_lm.pretrained import load_model

    model, seen = load_model(tiny_model).eval(), []
    for handle in attach(model):
        handle.pattern, handle.mode = random_pattern(handle.num_heads, 96, 16, density=0.5), "sparse"
    for user in (cached_keys, layer):
        monkeypatch.setattr(user, "attend_chunk", lambda *given: seen.append(given[0].shape[2]) or attend_chunk(*given))
    held = PatternCache(model) if cache == "pattern" else DynamicCache(config=model.config)
    tokens = torch.randint(40, 70, (1, 96))
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits
        parts = [model(input_ids=part, past_key_values=held).logits for part in tokens.split([40, 17, 16, 23], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)
    assert seen == [17] * len(list(attach(model))) + [23] * len(list(attach(model)))
    assert chunks.spans_rows(attach(model)[0].pattern, 17)
