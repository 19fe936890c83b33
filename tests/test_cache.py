import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertModel,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sparse_prune import BlockPattern
from sparse_prune.attention import attach, detach
from sparse_prune.cache import PatternCache, PatternLayer
from sparse_prune.kernels import AttentionOptions, check_backend
from support import families

RECORDS = pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 20),
    reason="before 5.20 assisted decoding did not tell the cache to keep what it may take back",
)

SMALL = {**families.SMALL, "max_position_embeddings": 256}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.5}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(sliding_window=9, **SMALL)),
    "gemma2, soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=1, sliding_window=9, **SMALL)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, pad_token_id=0, **GPT2)),
}
BLOCKS = [(4, 4), (8, 4), (4, 8)]
LEARNED = 32
GREEDY = {"do_sample": False, "eos_token_id": None}


def short_reach(heads, block, seed=0, dense_heads=()):
    """A sink block, the diagonal, and at random a little more of what is near; at least eight blocks of queries."""
    learned = max(LEARNED, 8 * block[0])
    dense = BlockPattern.dense(heads, learned, learned, block, True)
    rows, cols = (torch.arange(n) for n in dense.keep.shape[1:])
    diagonal = ((rows + 1) * block[0] - 1) // block[1]
    distance = diagonal[:, None] - cols
    near = (distance < 4) & (torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    keep = (distance < max(block[0] // block[1], 1)) | (cols == 0) | near
    keep[list(dense_heads)] = True
    return BlockPattern(keep, block, True, learned, learned)


def make(name="llama", block=(4, 4), dense_heads=()):
    torch.manual_seed(0)
    return prune(MODELS[name]().eval(), block, dense_heads)


def prune(model, block=(4, 4), dense_heads=()):
    for seed, handle in enumerate(attach(model)):
        handle.pattern = short_reach(handle.num_heads, block, seed, dense_heads)
        handle.mode, handle.backend = "sparse", "gather"
    return model


def tokens(length=37, batch=2, seed=1):
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids, count=6):
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_decoding_equals_the_masked_model_without_eviction(name, block, padding):
    model, ids = make(name, block), tokens(70)
    mask = left_padded(ids) if padding else torch.ones_like(ids)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, start = PatternCache(model), 21
    model(ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
    for step in range(start, ids.shape[1]):
        found = model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=cache).logits
        torch.testing.assert_close(found[:, -1], whole[:, step], atol=2e-4, rtol=2e-4)
    assert cache.get_seq_length() == 70
    assert cache.layers[0].evicted_at >= 64


@pytest.mark.parametrize("chunks", [(30, 20, 20), (1, 40, 2, 27), (8, 8, 8, 46)])
@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap", "mistral, sliding window"])
@torch.no_grad()
def test_continuing_in_chunks_equals_the_masked_model(name, chunks):
    model, ids = make(name), tokens(70)
    mask = left_padded(ids)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, end = PatternCache(model), 0
    for chunk in chunks:
        start, end = end, end + chunk
        found = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        real = mask[:, start:end].bool()
        torch.testing.assert_close(found[real], whole[:, start:end][real], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 10},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 10},
    ],
    ids=["greedy", "sampling", "beams", "several samples", "chunked prefill"],
)
@torch.no_grad()
def test_generate_equals_generation_with_a_cache_that_evicts_nothing(settings):
    model, ids = make(), tokens()
    settings = {"attention_mask": left_padded(ids), "max_new_tokens": 40, "eos_token_id": None, **settings}
    sequences = []
    for cache in (DynamicCache(), PatternCache(model)):
        torch.manual_seed(0)
        sequences.append(model.generate(ids, past_key_values=cache, **settings))
    assert torch.equal(*sequences)


@torch.no_grad()
def test_chat_goes_on_with_the_same_cache_and_with_copies_of_a_prefix():
    model, ids = make(), tokens(batch=1)
    cache = PatternCache(model)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=20, **GREEDY)
    prefix, question = copy.deepcopy(cache), torch.cat([first, tokens(9, 1, seed=2)], 1)
    expected = model.generate(question, use_cache=False, max_new_tokens=12, **GREEDY)
    assert torch.equal(model.generate(question, past_key_values=cache, max_new_tokens=12, **GREEDY), expected)
    assert torch.equal(model.generate(question, past_key_values=prefix, max_new_tokens=12, **GREEDY), expected)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=20, **GREEDY), first)


@RECORDS
@pytest.mark.parametrize("seed", [0, 5])  # an assistant that is always right, and one that never is
@torch.no_grad()
def test_assisted_decoding_gives_what_greedy_decoding_gives(seed):
    model, ids = make(), tokens(batch=1)
    torch.manual_seed(seed)
    assistant = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    if not seed:
        assistant = make()
    expected = model.generate(ids, use_cache=False, max_new_tokens=40, **GREEDY)
    cache = PatternCache(model)
    found = model.generate(ids, past_key_values=cache, assistant_model=assistant, max_new_tokens=40, **GREEDY)
    assert torch.equal(found, expected)
    assert cache.layers[0].evicted_at > len(ids[0])


@RECORDS
@torch.no_grad()
def test_a_chat_that_goes_on_after_assisted_decoding_evicts_again():
    model, assistant, ids = make(), make(), tokens(batch=1)
    sizes, sequences = [], []
    for helper in ({}, {"assistant_model": assistant}):
        cache = PatternCache(model)
        answer = model.generate(ids, past_key_values=cache, max_new_tokens=40, **helper, **GREEDY)
        question = torch.cat([answer, tokens(6, 1, seed=4)], 1)
        sequences.append(model.generate(question, past_key_values=cache, max_new_tokens=120, **GREEDY))
        sizes.append(cache.nbytes())
    assert torch.equal(*sequences)
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_a_reset_cache_evicts_from_the_start():
    model, ids = make(), tokens(batch=1)
    cache, fresh = PatternCache(model), PatternCache(model)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.reset()
    for each in (cache, fresh):
        model(ids, past_key_values=each)
    assert cache.nbytes() == fresh.nbytes()


@torch.no_grad()
def test_crop_goes_back_as_far_as_nothing_is_missing():
    model, ids = make(), tokens(64, 1)
    whole = model(ids, use_cache=False).logits
    cache = PatternCache(model)
    model(ids[:, :41], past_key_values=cache)
    for step in range(41, 44):
        model(ids[:, step : step + 1], past_key_values=cache)
    cache.crop(-2)
    found = model(ids[:, 42:43], past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], whole[:, 42], atol=2e-4, rtol=2e-4)
    with pytest.raises(RuntimeError, match="evicted at 41"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(3)
    cache.activate_past_recording()
    for step in range(43, 60):
        model(ids[:, step : step + 1], past_key_values=cache)
    cache.crop(-15)
    found = model(ids[:, 45:46], past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], whole[:, 45], atol=2e-4, rtol=2e-4)


class HostCopies(TorchDispatchMode):
    """Operations that bring a tensor of the host, more than a number, to the device "meta"."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [thing for thing in pytree.tree_leaves([args, kwargs, result]) if isinstance(thing, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.dim()}) > 1:
            self.found.append(str(func))
        return result


class NoKernel:
    """In place of a kernel, which nothing can run on the device "meta"."""

    launches = 0

    def __getitem__(self, grid):
        NoKernel.launches += 1
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("backend", ["gather", "triton"])
@pytest.mark.parametrize("masks", ["none", "padding", "every head's own"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@torch.no_grad()
def test_tokens_within_a_block_bring_nothing_from_the_host_and_ask_for_nothing(masks, softcap, backend, monkeypatch):
    """The device "meta" refuses to tell a value, as a GPU would make the host wait for it."""
    block = 16 if backend == "triton" else 4
    handle = attach(make(block=(block, block), dense_heads=(3,)))[0]
    layer, decode_kernel = PatternLayer(handle, handle.pattern), None
    if backend == "triton":
        launch = pytest.importorskip("sparse_prune.kernels.triton.launch")
        monkeypatch.setattr(launch, "decode_kernel", NoKernel())
        monkeypatch.setattr(launch, "combine_kernel", NoKernel())
        attend = pytest.importorskip("sparse_prune.kernels.triton.attend")
        monkeypatch.setattr(attend, "call_dtype", lambda query: query.dtype)  # "meta" knows no autocast
        decode_kernel = check_backend("triton").decode

    def decode(new, seen):
        key = torch.empty(1, 2, new, 8, device="meta")
        held, _ = layer.update(key, key)
        key_mask = torch.ones(1, seen, dtype=torch.bool, device="meta") if masks == "padding" else None
        attn_mask = torch.ones(1, 4, new, seen, dtype=torch.bool, device="meta") if "own" in masks else None
        options = AttentionOptions(key_mask=key_mask, attn_mask=attn_mask, softcap=softcap)
        if seen > new:
            held.attend(torch.empty(1, 4, new, 8, device="meta"), options, decode_kernel)

    decode(20 * block + 1, 20 * block + 1)
    decode(1, 20 * block + 2)
    assert len(layer.held.head_sets) > 1  # heads that hold different numbers of blocks
    before = NoKernel.launches
    with HostCopies() as copies:
        decode(1, 20 * block + 3)
        decode(1, 20 * block + 4)
    assert copies.found == []
    assert NoKernel.launches - before == (4 if backend == "triton" else 0)


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap", "mistral, sliding window"])
@torch.no_grad()
def test_swapped_layers_decode_by_the_kernel(name, monkeypatch):
    """Tokens and chunks over what is held, padding and heads that hold different numbers of blocks included."""
    attend = pytest.importorskip("sparse_prune.kernels.triton.attend")
    model, ids, calls = make(name, (16, 16), dense_heads=(3,)), tokens(90), []
    mask = left_padded(ids)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for handle in attach(model):
        handle.backend = "triton"
    inner = attend.decode
    monkeypatch.setattr(attend, "decode", lambda *given: calls.append(given) or inner(*given))
    cache, end = PatternCache(model), 0
    for chunk in (45, 1, 1, 5, 12, 1, 10, 15):
        start, end = end, end + chunk
        found = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        real = mask[:, start:end].bool()
        torch.testing.assert_close(found[real], whole[:, start:end][real], atol=2e-4, rtol=2e-4)
    assert len(calls) == 7 * len(cache.layers)
    # Behind a window of 9 tokens all heads hold equally many blocks.
    assert any(len(layer.held.head_sets) > 1 for layer in cache.layers) == ("window" not in name)


def live_bytes():
    """Bytes of all storages that any tensor of this process holds."""
    gc.collect()
    # Fake tensors of compiled functions have no memory.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def grown_by(model, cache, ids, steps):
    """Bytes by which a prefill and some decoding make the process grow, while only the cache is held."""
    before = live_bytes()
    model(ids[:, :-steps], past_key_values=cache)
    for step in range(ids.shape[1] - steps, ids.shape[1]):
        model(ids[:, step : step + 1], past_key_values=cache)
    return live_bytes() - before


@torch.no_grad()
def test_memory_of_the_process_falls():
    model, ids = make(), tokens(201)
    grown_by(model, PatternCache(model), ids, 3)  # patterns at these lengths are there from now on
    evicting, everything = PatternCache(model), DynamicCache()
    small, large = grown_by(model, evicting, ids, 3), grown_by(model, everything, ids, 3)
    assert large == sum(2 * layer.keys.untyped_storage().nbytes() for layer in everything.layers)
    assert small == evicting.nbytes()
    assert small < large / 4
    held = [head_set.blocks.shape for head_set in evicting.layers[0].held.head_sets]
    pattern = evicting.layers[0].pattern
    needed = pattern.needed_after(200).view(2, 2, -1).any(1).sum(-1)
    assert sum(heads * blocks for heads, blocks in held) == int(needed.sum()) + 2  # and the latest, per KV head


@torch.no_grad()
def test_allocator_frees_what_is_evicted():
    model, ids = make(), tokens(201)
    model(ids, use_cache=False)
    grown = []
    for cache in (PatternCache(model), DynamicCache()):
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(ids, past_key_values=cache)
            gc.collect()
        grown.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
    assert 0 < grown[0] < grown[1] / 4


@torch.no_grad()
def test_evicted_tensors_are_not_kept_alive():
    model, ids, kept = make(), tokens(), []
    cache = PatternCache(model)
    model(ids, past_key_values=cache)
    kept = [weakref.ref(layer.held.keys) for layer in cache.layers]
    for step in range(8):
        model(ids[:, step : step + 1], past_key_values=cache)
    gc.collect()
    assert all(ref() is None for ref in kept)


@torch.no_grad()
def test_dense_heads_and_dense_layers_hold_everything():
    model, ids = make(dense_heads=(3,)), tokens(90)
    attach(model)[1].mode = "dense"
    cache = PatternCache(model)
    whole = model(ids, use_cache=False).logits
    model(ids[:, :60], past_key_values=cache)
    for step in range(60, 90):
        found = model(ids[:, step : step + 1], past_key_values=cache).logits
    torch.testing.assert_close(found[:, -1], whole[:, -1], atol=2e-4, rtol=2e-4)
    first, second = cache.layers
    assert isinstance(first, PatternLayer)
    assert sorted(head_set.blocks.shape[1] for head_set in first.held.head_sets)[-1] == 23
    assert second.keys.shape[2] == 90


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap"])
@torch.no_grad()
def test_decoding_under_autocast_equals_the_masked_model(name):
    model, ids = make(name, dense_heads=(3,)), tokens(70)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(ids, use_cache=False).logits.float()
        cache, ragged = PatternCache(model), False
        model(ids[:, :30], past_key_values=cache)
        for step in range(30, 70):
            found = model(ids[:, step : step + 1], past_key_values=cache).logits.float()
            torch.testing.assert_close(found[:, -1], whole[:, step], atol=0.6, rtol=0.1)
            ragged |= any(len(layer.held.head_sets) > 1 for layer in cache.layers)
    assert ragged  # heads that hold different numbers of blocks


@torch.no_grad()
def test_caches_do_not_mix():
    model, ids = make(), tokens(70)
    whole = [model(part, use_cache=False).logits for part in (ids, ids.flip(1))]
    caches = [PatternCache(model), PatternCache(model)]
    for part, cache in zip((ids, ids.flip(1)), caches, strict=True):
        model(part[:, :40], past_key_values=cache)
    for step in range(40, 70):
        for part, cache, expected in zip((ids, ids.flip(1)), caches, whole, strict=True):
            found = model(part[:, step : step + 1], past_key_values=cache).logits
            torch.testing.assert_close(found[:, -1], expected[:, step], atol=2e-4, rtol=2e-4)


def decode(model, ids, cache):
    return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1)


def reattached(model):
    patterns = [handle.pattern for handle in attach(model)]
    detach(model)
    for handle, pattern in zip(attach(model), patterns, strict=True):
        handle.pattern, handle.mode, handle.backend = pattern, "sparse", "gather"
    return model


@pytest.mark.parametrize(
    "changed",
    [
        lambda model, cache: (model, pickle.loads(pickle.dumps(cache))),
        lambda model, cache: (copy.deepcopy(model), cache),
        lambda model, cache: copy.deepcopy((model, cache)),
        lambda model, cache: pickle.loads(pickle.dumps((model, cache))),
        lambda model, cache: (reattached(model), cache),
    ],
    ids=["pickled cache", "copied model", "both copied", "both pickled", "attached anew"],
)
@torch.no_grad()
def test_pickled_and_copied_caches_and_models_go_on(changed):
    model, ids = make(), tokens(50)
    whole = model(ids, use_cache=False).logits
    cache = PatternCache(model)
    model(ids[:, :30], past_key_values=cache)
    model, cache = changed(model, cache)
    found = decode(model, ids[:, 30:], cache)
    torch.testing.assert_close(found, whole[:, 30:], atol=2e-4, rtol=2e-4)


def test_threads_share_a_model(monkeypatch):
    model, ids = make(), tokens(40)
    parts = [ids, ids.flip(1)]
    both, update = threading.Barrier(2), PatternLayer.update

    def update_in_step(*args, **kwargs):
        held = update(*args, **kwargs)
        both.wait(10)  # each has given its keys before either attends
        return held

    monkeypatch.setattr(PatternLayer, "update", update_in_step)

    @torch.no_grad()
    def serve(part):
        cache = PatternCache(model)
        model(part[:, :30], past_key_values=cache)
        return decode(model, part[:, 30:], cache)

    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        for part, found in zip(parts, pool.map(serve, parts), strict=True):
            torch.testing.assert_close(found, model(part, use_cache=False).logits[:, 30:], atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_what_a_cache_holds_is_for_attention_that_was_taken_over():
    model, ids = make(), tokens()
    cache = PatternCache(model)
    model(ids, past_key_values=cache)
    detach(model)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(TypeError, match="attached attention layer.*attach"):
            model(ids[:, :1], past_key_values=cache)
    model = prune(DiffLlamaForCausalLM(DiffLlamaConfig(**SMALL)).eval())
    cache = PatternCache(model)
    with pytest.raises(TypeError, match="chunk.*changes keys or values after the cache"):
        model(ids, past_key_values=cache)
    held, _ = cache.layers[0].update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    with pytest.raises(AttributeError, match="repeat"):
        held.repeat(1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*from one PatternCache"):
        attach(model)[0].attend(torch.zeros(2, 4, 1, 8), held, torch.zeros(2, 2, 38, 8), AttentionOptions(), dense=None)


def test_models_that_cache_other_things_are_refused():
    model = FalconH1ForCausalLM(FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8))
    attach(model)
    with pytest.raises(ValueError, match="`model` must cache keys and values of each"):
        PatternCache(model)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
@torch.no_grad()
def test_keys_that_other_layers_use_again_are_kept(name, padding):
    torch.manual_seed(0)
    sizes = SMALL | {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 9, "num_kv_shared_layers": 2}
    sizes |= {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8}
    sizes |= {"layer_types": ["sliding_attention", "full_attention"] * 3}
    if name == "gemma3n":
        model = Gemma3nForCausalLM(Gemma3nTextConfig(activation_sparsity_pattern=None, **sizes))
    else:
        model = Gemma4ForCausalLM(Gemma4TextConfig(global_head_dim=8, **sizes))
    model, ids = prune(model.eval()), tokens(21)
    settings = {"attention_mask": left_padded(ids) if padding else torch.ones_like(ids), "max_new_tokens": 20, **GREEDY}
    cache = PatternCache(model)
    found = model.generate(ids, past_key_values=cache, **settings)
    assert torch.equal(found, model.generate(ids, use_cache=False, **settings))
    assert [isinstance(layer, PatternLayer) for layer in cache.layers] == [True] * 2 + [False] * 4


@torch.no_grad()
def test_a_decoder_is_served_whose_config_counts_an_encoder_too():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "init_std": 0.5, "is_decoder": True}
    model, ids = prune(BartForCausalLM(BartConfig(vocab_size=50, **sizes)).eval()), tokens()
    cache = PatternCache(model)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert torch.equal(found, model.generate(ids, use_cache=False, max_new_tokens=20, **GREEDY))
    assert len(cache.layers) == 2


def test_what_cannot_be_right_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="attach"):
        PatternCache(MODELS["llama"]())
    bert = BertModel(BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    attach(bert)
    with pytest.raises(ValueError, match="`model` must"):
        PatternCache(bert)
    with pytest.raises(ValueError, match="decoder"):
        PatternCache(torch.nn.Linear(2, 2))
    model, ids = make(), tokens()
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, past_key_values=PatternCache(model))
    cache = PatternCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        attach(model)[0].pattern = short_reach(4, (4, 4), seed=9)
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*evicted by"):
            model(ids[:, :1], past_key_values=cache)
        model(ids, use_cache=False)  # what broke off leaves nothing behind
        with pytest.raises(NotImplementedError, match="offloaded"):
            cache.layers[0].offload()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_decoding_is_right_and_the_allocator_frees():
    model, ids = make().cuda(), tokens(201).cuda()
    whole = model(ids, use_cache=False).logits
    grown = []
    for cache in (PatternCache(model), DynamicCache()):
        model(ids[:, :-1], past_key_values=PatternCache(model))  # tables of patterns at these lengths stay
        gc.collect()
        before = torch.cuda.memory_allocated()
        model(ids[:, :-1], past_key_values=cache)
        gc.collect()
        grown.append(torch.cuda.memory_allocated() - before)
        found = model(ids[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(found[:, -1], whole[:, -1], atol=1e-3, rtol=1e-3)
    assert 0 < grown[0] < grown[1] / 3
