import copy
import gc
import io
import pickle
import weakref
from functools import partial

import pytest
import torch
from transformers import (
    AttentionInterface,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BigBirdPegasusConfig,
    BigBirdPegasusForCausalLM,
    BigBirdPegasusForConditionalGeneration,
    CLIPTextConfig,
    CLIPTextModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LayoutLMConfig,
    LayoutLMModel,
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    StaticCache,
    SwinConfig,
    SwinModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    masking_utils,
)
from transformers.masking_utils import AttentionMaskInterface

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule
from sparse_prune.attention import attach, detach, find_layers, hf, hf_masks, list_layers
from sparse_prune.attention.hf_make_mask import make_mask
from sparse_prune.cache import PatternCache
from support.families import BERT, BLOCK, GPT2, LENGTH, MODELS, SMALL, make, tokens

GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}


def set_patterns(handles, mode, density=1.0, backend="gather"):
    for handle in handles:
        dense = BlockPattern.dense(handle.num_heads, LENGTH, LENGTH, BLOCK, handle.causal)
        keep = torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(2)) < density
        keep |= torch.eye(3, dtype=torch.bool)
        handle.pattern = BlockPattern(keep, (BLOCK, BLOCK), handle.causal, LENGTH, LENGTH)
        handle.mode, handle.backend = mode, backend


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@torch.no_grad()
def test_full_pattern_computes_what_the_model_computed(name, padding):
    model, ids = make(name), tokens()
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, :5] = 0
        mask = mask if padding == "left" else mask.flip(1)
    expected = model(ids, attention_mask=mask)[0]
    handles = attach(model)
    assert len(handles) == 2
    for mode in ("dense", "masked", "sparse"):
        set_patterns(handles, mode)
        found = model(ids, attention_mask=mask)[0]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
        assert mode != "dense" or torch.equal(found, expected)  # padding's own outputs too
    detach(model)
    assert torch.equal(model(ids, attention_mask=mask)[0], expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_sparse_equals_masked_and_differs_from_dense(name):
    model, ids = make(name), tokens()
    handles, outputs = attach(model), {}
    for mode in ("dense", "masked", "sparse"):
        set_patterns(handles, mode, density=0.3)
        outputs[mode] = model(ids)[0]
    torch.testing.assert_close(outputs["sparse"], outputs["masked"], atol=1e-4, rtol=1e-4)
    assert (outputs["dense"] - outputs["masked"]).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["masked", "sparse"])
@torch.no_grad()
def test_a_pattern_keeps_to_the_window_on_both_sides_of_a_token(mode):
    model, ids = make("modernbert, global and local"), tokens()
    padding = torch.ones_like(ids)
    padding[0, -5:] = 0
    handles = attach(model)
    assert [layer.window for layer in list_layers(model)] == [None, 7]  # a token itself and six on each side
    set_patterns(handles, mode, density=0.5)
    found = model(ids, attention_mask=padding)[0]
    detach(model)
    place = torch.arange(LENGTH)
    near = (place[:, None] - place).abs() <= 6
    seen = handles[0].pattern.token_mask(LENGTH, LENGTH)[None] & padding[:, None, None, :].bool()
    expected = model(ids, attention_mask={"full_attention": seen, "sliding_attention": seen & near})[0]
    torch.testing.assert_close(found[padding.bool()], expected[padding.bool()], atol=1e-4, rtol=1e-4)


def bart(encoder_heads, decoder_heads):
    torch.manual_seed(0)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": encoder_heads, "decoder_attention_heads": decoder_heads}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, init_std=0.3, **size, **heads)).eval()


@torch.no_grad()
def test_cross_attention_sees_no_padding_when_source_and_target_are_equally_long():
    model = bart(encoder_heads=2, decoder_heads=2)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, LENGTH), "decoder_input_ids": tokens().flip(1)}
    inputs["attention_mask"][:, 4:] = 0
    expected = model(**inputs).logits
    assert [handle.causal for handle in attach(model)] == [False, True]
    assert torch.equal(model(**inputs).logits, expected)
    inputs["input_ids"][:, 4:] = 3
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_heads_are_the_layers_own_where_a_decoder_has_other_ones():
    model = bart(encoder_heads=2, decoder_heads=4)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1)}
    expected = model(**inputs).logits
    handles = attach(model)
    assert [(handle.num_heads, handle.num_kv_heads) for handle in handles] == [(2, 2), (4, 4)]
    set_patterns(handles, "sparse")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("last", [1, 3, 12])
@torch.no_grad()
def test_layers_that_share_keys_may_leave_out_queries(last, padding):
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    sizes = {"head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8}
    config = Gemma4TextConfig(sliding_window=6, **kinds, **sizes, **SMALL | {"num_hidden_layers": 4})
    model, ids = Gemma4ForCausalLM(config).eval(), tokens()
    inputs = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs["attention_mask"][0, : 5 * padding] = 0
    expected = model(ids, logits_to_keep=last, **inputs).logits
    handles = attach(model)
    torch.testing.assert_close(model(ids, logits_to_keep=last, **inputs).logits, expected, atol=1e-4, rtol=1e-4)
    set_patterns(handles, "sparse", density=0.3)
    expected = model(ids, **inputs).logits[:, -last:]
    torch.testing.assert_close(model(ids, logits_to_keep=last, **inputs).logits, expected, atol=1e-4, rtol=1e-4)
    model(ids[:, :6], logits_to_keep=1)  # as many keys as a window leaves


def test_vision_transformer_is_reached():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model, image = ViTModel(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(image)[0]
        handles = attach(model)
        for handle in handles:
            handle.probe_block_size = (4, 4)
        torch.testing.assert_close(model(image)[0], expected)
    assert [handle.causal for handle in handles] == [False, False]
    assert handles[0].statistics.sums.shape == (3, 4, 5, 5)


@torch.no_grad()
def test_soft_cap_is_respected_in_every_mode():
    torch.manual_seed(0)
    config = Gemma2Config(head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=1, **SMALL)
    model, ids = Gemma2ForCausalLM(config).eval(), tokens()
    model.set_attn_implementation("eager")
    expected = model(ids)[0]
    handles = attach(model)
    for mode in ("dense", "masked", "sparse"):
        set_patterns(handles, mode)
        torch.testing.assert_close(model(ids)[0], expected, atol=1e-4, rtol=1e-4)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    set_patterns(handles, "masked", density=0.3)
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
UNTOLD = {  # their window does not reach the attention function
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(use_sliding_window=True, sliding_window=9, layer_types=["sliding_attention"] * 2, **MOE, **SMALL)
    ),
    "phimoe": lambda: PhimoeForCausalLM(
        PhimoeConfig(sliding_window=9, num_local_experts=2, num_experts_per_tok=1, **SMALL)
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
@torch.no_grad()
def test_keys_that_a_cache_dropped_are_counted_even_where_no_window_is_told(name):
    torch.manual_seed(0)
    model, ids = UNTOLD[name]().eval(), tokens()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    handles = attach(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    set_patterns(handles, "sparse", density=0.3)
    expected = model.generate(ids, use_cache=False, **settings)
    for cache in (None, PatternCache(model)):
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


@torch.no_grad()
def test_patterns_count_keys_that_a_window_has_dropped():
    model, ids = make("mistral, sliding window"), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for prompt in (ids, ids[:, :3]):
        expected = model.generate(prompt, use_cache=False, **settings)
        for cache in (DynamicCache, partial(PatternCache, model), lambda: None):  # None: the model's, which drops keys
            for more in ({}, {"prefill_chunk_size": 4}):
                assert torch.equal(model.generate(prompt, past_key_values=cache(), **more, **settings), expected)
    own = torch.ones(2, 1, 1, 6, dtype=torch.bool)  # as wide as the window: it does not tell what was dropped
    cache = model(ids[:, :7]).past_key_values
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn.* may have dropped keys .*PatternCache.*DynamicCache\(\)"
    ):
        model(ids[:, 7:8], attention_mask=own, past_key_values=cache)


@torch.no_grad()
def test_a_mask_that_shows_dropped_keys_is_refused():
    model, ids = make("mistral, sliding window"), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    cache = model(ids[:, :9]).past_key_values
    shown = make_mask(2, 1, 6, q_offset=9, kv_offset=4, allow_is_causal_skip=False)
    assert shown.shape[-1] == 10
    with pytest.raises(ValueError, match="may have dropped keys"):
        model(ids[:, 9:10], attention_mask=shown, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_helpers_of_generation_make_caches_of_their_own(name):
    model, other, ids = make(name), make(name), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for helped in (
        {"assistant_model": model},
        {"assistant_model": other},
        {"assistant_early_exit": 1},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5, "negative_prompt_ids": ids[1:, :4]},
    ):
        plain = {key: value for key, value in helped.items() if "guid" in key or "negative" in key}
        expected = model.generate(ids[:1], use_cache=False, **plain, **settings)
        for cache in (DynamicCache(), PatternCache(model)):
            assert torch.equal(model.generate(ids[:1], past_key_values=cache, **helped, **settings), expected), helped


@torch.no_grad()
def test_a_loaded_model_brings_its_attention_function_along(monkeypatch):
    model, ids = make("llama"), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    file = io.BytesIO()
    torch.save((model, model(ids)[0]), file)
    for registry in (AttentionInterface, AttentionMaskInterface):  # as in a new process
        monkeypatch.delitem(registry._global_mapping, hf.IMPLEMENTATION)
    file.seek(0)
    model, expected = torch.load(file, weights_only=False)
    assert torch.equal(model(ids)[0], expected)


@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without():
    model, ids = make("llama"), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@torch.no_grad()
def test_generation_with_a_static_cache_equals_generation_without(name, padding, mode):
    model, ids = make(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, : 5 * padding] = 0
    set_patterns(attach(model), mode, density=0.3)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("chunks", [[LENGTH], [1, LENGTH - 1], [10, 1, LENGTH - 11]])
@torch.no_grad()
def test_chunks_with_a_static_cache_equal_the_whole(room, chunks):
    model, ids = make("llama"), tokens()
    set_patterns(attach(model), "sparse", density=0.3)
    whole = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + room)
    found = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=1e-4)


def test_decoding_between_training_steps_is_not_probed():
    model, ids = make("llama"), tokens()
    handle = attach(model)[0]
    handle.probe_block_size = (BLOCK, BLOCK)
    cache = model(ids, use_cache=True).past_key_values
    seen, shape = handle.statistics, handle.last_shape
    assert seen.sums.shape == (3, 4, 3, 3)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :9], past_key_values=cache)
    assert handle.statistics is seen
    assert handle.last_shape is shape


def test_training_with_a_prefix_is_refused_at_the_first_probe():
    model, ids = make("llama"), tokens()
    handles = attach(model)
    prefix = [tuple(torch.randn(2, 2, 3, 8, requires_grad=True) for _ in "kv") for _ in handles]
    model(ids, past_key_values=DynamicCache(prefix))
    for handle in handles:
        assert handle.last_shape is None
        handle.probe_block_size = (BLOCK, BLOCK)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*own tokens.*24 queries and 27 keys"):
        model(ids, past_key_values=DynamicCache(prefix))


def test_attaching_twice_gives_the_same_handles():
    model = make("llama")
    assert attach(model) == attach(model)
    assert list(find_layers(model)) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_a_float_mask_hides_what_a_boolean_one_hides():
    model, ids = make("llama"), tokens()
    set_patterns(attach(model), "masked")
    shown = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    shown[0, ..., 3] = False
    added = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    rows = slice(4, None)  # whose keys are not all hidden
    expected = model(ids, attention_mask=shown).logits[:, rows]
    assert not torch.allclose(expected[0], model(ids).logits[0, rows])
    torch.testing.assert_close(model(ids, attention_mask=added).logits[:, rows], expected)


@pytest.mark.parametrize(
    "bias", [torch.full((2, 1, LENGTH, LENGTH), 0.5), torch.zeros(LENGTH, LENGTH).requires_grad_()]
)
def test_a_mask_that_adds_a_bias_is_refused_with_the_layer_named(bias):
    model = make("llama")
    set_patterns(attach(model), "masked")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*adds a bias"):
        model(tokens(), attention_mask=bias.expand(2, 1, -1, -1))


def test_an_encoder_is_pruned_that_makes_its_own_float_mask():
    config = LayoutLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    model, ids = LayoutLMModel(config).train(), tokens()
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[0, LENGTH // 2 :] = 0
    pruner = AttentionPruner(ConstantSchedule(final=0.4), block_size=BLOCK)
    pruner.attach(model)
    pruner.probe(True)
    model(ids, bbox=torch.zeros(2, LENGTH, 4, dtype=torch.int64), attention_mask=padding)
    pruner.update(1)
    assert pruner.total_sparsity > 0.2


def test_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="no attention layers"):
        attach(torch.nn.Linear(2, 2))


def test_a_layer_without_source_is_judged_when_it_runs():
    scope = {}
    exec("def forward(self, hidden_states):\n    return hidden_states\n", scope)
    assert hf._keywords(scope["forward"]) == {}


T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def test_layers_that_add_a_position_bias_are_listed_and_stay_dense(caplog):
    """Also those that get the bias from another layer; the model around them is pruned without them."""
    layers = list_layers(T5ForConditionalGeneration(T5Config(**T5)))
    wanted = [
        "encoder.block.0.layer.0.SelfAttention",
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    ]
    assert [layer.name for layer in layers] == wanted
    assert {layer.problem for layer in layers} == {"an additive position bias (`position_bias`)", "cross-attention"}
    mixed = torch.nn.ModuleDict({"t5": T5EncoderModel(T5Config(**T5)), "llama": make("llama")}).eval()
    expected = mixed["t5"](tokens())[0]
    assert [handle.name for handle in attach(mixed)] == [f"llama.model.layers.{i}.self_attn" for i in (0, 1)]
    assert "'t5.encoder.block.0.layer.0.SelfAttention': an additive position bias" in caplog.text
    assert torch.equal(mixed["t5"](tokens())[0], expected)


@pytest.mark.parametrize("learned", [True, False])
def test_sinks_stand_in_the_way_only_where_a_layer_has_them(learned):
    config = {"intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes = {"vocab_size": 50, "hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **config))
    if not learned:
        model.model.layers[0].self_attn.sinks = None
    (layer,) = list_layers(model)
    assert layer.problem == ("learned attention sinks (`s_aux`)" if learned else None)


def test_a_layer_with_sinks_keeps_them_beside_one_that_was_taken_over():
    mimo = pytest.importorskip("transformers.models.mimo_v2_flash")
    torch.manual_seed(0)
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "dense"]}
    sizes = {"head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "sliding_window": 9}
    config = mimo.MiMoV2FlashConfig(moe_intermediate_size=16, **kinds, **sizes, **SMALL)
    model = mimo.MiMoV2FlashForCausalLM(config).eval()
    ids, padding = tokens(), torch.ones_like(tokens())
    padding[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=padding).logits
        (handle,) = attach(model)
        assert handle.name == "model.layers.0.self_attn"
        for mode in ("dense", "masked", "sparse"):
            set_patterns([handle], mode)
            found = model(ids, attention_mask=padding).logits
            torch.testing.assert_close(found[padding.bool()], expected[padding.bool()], atol=1e-4, rtol=1e-4)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        handle.mode = "dense"
        generated = model.generate(ids, **settings)
        detach(model)
        assert torch.equal(model.generate(ids, **settings), generated)
        assert torch.equal(model(ids, attention_mask=padding).logits, expected)


def own_argument(self, query, index):
    index = self.indexer(query, other=index)
    attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)  # noqa: F821
    return attention_interface(self, query, query, query, None, scaling=self.scaling, block_indices=index)


def test_what_a_layer_hands_to_attention_is_known_or_the_layer_stays_dense():
    module = type("Attention", (torch.nn.Module,), {"forward": own_argument})()
    assert hf.refused("self_attn", module) == "a sparse index of its own (`block_indices`)"


@torch.no_grad()
def test_a_decoder_that_leaves_causality_to_its_mask_sees_no_future():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BigBirdPegasusForCausalLM(
        BigBirdPegasusConfig(vocab_size=50, init_std=0.5, is_decoder=True, pad_token_id=0, **sizes)
    ).eval()
    ids, other = tokens(), tokens()
    other[:, 12:] = 5
    expected = model(ids).logits
    handles = attach(model)
    assert [handle.causal for handle in handles] == [True, True]
    for mode in ("dense", "masked", "sparse"):
        set_patterns(handles, mode)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)
        assert torch.equal(model(ids).logits[:, :12], model(other).logits[:, :12])
    set_patterns(handles, "sparse", density=0.3)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


@torch.no_grad()
def test_an_encoder_of_its_own_gets_the_masks_that_it_got():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_type": "original_full"}
    model = BigBirdPegasusForConditionalGeneration(BigBirdPegasusConfig(vocab_size=50, init_std=0.5, **sizes)).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1), "attention_mask": torch.ones(2, LENGTH)}
    inputs["attention_mask"][0, -5:] = 0
    expected = model(**inputs).logits
    attach(model)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_without_sdpa_is_taken_over_and_given_back():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 2}
    sizes |= {"encoder_sparse_step": 0, "decoder_sparse_step": 0, "init_std": 0.5}
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(vocab_size=50, **sizes)).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens().flip(1), "use_cache": False}
    inputs["attention_mask"] = torch.ones(2, LENGTH).tril(20)
    expected = model(**inputs).logits
    layers = {layer.name.removeprefix("model."): (layer.causal, layer.problem) for layer in list_layers(model)}
    assert layers == {
        "encoder.layers.0.self_attn": (False, None),
        "decoder.layers.0.self_attn": (True, None),
        "decoder.layers.0.cross_attention": (False, "cross-attention"),
    }
    attach(model)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
    detach(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_detach_gives_back_the_implementation_that_was_in_force(own):
    model = LlamaForCausalLM(LlamaConfig(attn_implementation=own, **SMALL))
    attach(model)
    attach(model)
    assert model.config._attn_implementation == "sparse_prune"
    detach(model)
    assert model.config._attn_implementation == own


def test_only_models_with_layers_that_were_taken_over_are_switched():
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**BERT), BertConfig(**BERT))
    whole = EncoderDecoderModel(config)
    attach(whole, module="encoder")
    assert whole.encoder.config._attn_implementation == "sparse_prune"
    assert whole.decoder.config._attn_implementation == "sdpa"
    pair = torch.nn.ModuleDict({"model": make("llama"), "model_ref": make("llama")})
    attach(pair, module="model_ref")
    assert pair["model"].config._attn_implementation == "sdpa"


def test_an_example_shows_a_bias_inside_a_mask(caplog):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    model, image = SwinModel(SwinConfig(**sizes)).eval(), torch.rand(1, 3, 16, 16)
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            torch.nn.init.normal_(parameter)
    assert [layer.problem for layer in list_layers(model)] == [None]
    (layer,) = list_layers(model, image)
    assert layer.problem.startswith("adds a bias to attention")
    with pytest.raises(ValueError, match="adds a bias to attention"):
        attach(model, image)
    expected = model(image)[0]
    (handle,) = attach(model)  # the first probe tells what no example told
    handle.probe_block_size = (4, 4)
    assert torch.equal(model(image)[0], expected)
    assert handle.aside.startswith("adds a bias to attention")
    assert "This attention layer stays dense" in caplog.text


class Options(list):
    """Options of every call of a layer."""

    def watch(self, handle, monkeypatch):
        attend = handle.attend
        monkeypatch.setattr(
            handle, "attend", lambda *call, **dense: self.append(call[-1]) or attend(*call, **dense), raising=False
        )
        return self


@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_a_sliding_window_reaches_the_kernels_as_one(monkeypatch, padding):
    model, ids = make("mistral, sliding window"), tokens()
    mask = torch.ones_like(ids)
    mask[0, : 5 * padding] = 0
    seen = Options().watch(attach(model)[0], monkeypatch)
    model(ids, attention_mask=mask)
    (options,) = seen
    assert (options.window, options.attn_mask) == (6, None)
    assert torch.equal(options.key_mask, mask.bool()) if padding else options.key_mask is None
    model(ids[:, :6], attention_mask=mask[:, :6])  # the window hides nothing
    assert (seen[1].window, seen[1].attn_mask) == (None, None)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@torch.no_grad()
def test_documents_keep_their_window_and_what_is_more_than_that_stays_a_mask(monkeypatch, mode):
    model, ids = make("mistral, sliding window"), tokens()
    packed = {"position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)}
    own = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    custom = {"attention_mask": own.tril() | torch.eye(LENGTH, dtype=torch.bool)}
    expected = [model(ids, use_cache=False, **inputs)[0] for inputs in (packed, custom)]
    handles = attach(model)
    set_patterns(handles, mode)
    seen = Options().watch(handles[0], monkeypatch)
    for inputs, wanted in zip((packed, custom), expected, strict=True):
        torch.testing.assert_close(model(ids, use_cache=False, **inputs)[0], wanted, atol=1e-4, rtol=1e-4)
    apart, masked = seen
    assert apart.documents[0].tolist() == [0] * 10 + [1] * 14
    assert (apart.window, apart.attn_mask, masked.window, masked.documents) == (6, None, None, None)
    assert masked.attn_mask is not None


def test_documents_are_found_in_the_masks_of_older_transformers_too(monkeypatch):
    """5.17 to 5.19 put the documents behind causality and leave positions as they are."""
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence", raising=False)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
    parts = masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(documents)
    packed = make_mask(1, 6, 6, mask_function=masking_utils.and_masks(*parts))
    assert torch.equal(packed, documents.int())
    hides_less = masking_utils.or_masks(*parts)
    either = make_mask(1, 6, 6, mask_function=hides_less, allow_is_causal_skip=False)
    assert either.shape == (1, 1, 6, 6)
    assert either[0, 0, 3].tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize("name", ["gemma2", "modernbert"])
@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_only_causal_layers_with_a_window_get_one(monkeypatch, name, padding):
    torch.manual_seed(0)
    if name == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(head_dim=8, sliding_window=6, attn_logit_softcapping=None, **SMALL))
    else:
        model = MODELS["modernbert, global and local"]()
    model, ids = model.eval(), tokens()
    mask = torch.ones_like(ids)
    mask[0, : 5 * padding] = 0
    expected = model(ids, attention_mask=mask)[0]
    handles = attach(model)
    seen = Options()
    for handle in handles:
        seen.watch(handle, monkeypatch)
    for mode in ("dense", "masked", "sparse"):
        set_patterns(handles, mode)
        found = model(ids, attention_mask=mask)[0]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    windows = {options.window for options in seen}
    assert windows == ({6, None} if name == "gemma2" else {None})


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("settings", [{"use_cache": False}, {}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_a_dense_model_with_a_window_generates_what_it_did(padding, settings):
    model, ids = make("mistral, sliding window"), tokens()
    mask = torch.ones_like(ids)
    mask[0, : 5 * padding] = 0
    settings |= {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    attach(model)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_who_wants_all_of_a_mask_gets_it():
    from transformers.masking_utils import sliding_window_causal_mask_function

    asked = {"mask_function": sliding_window_causal_mask_function(4), "local_size": 4}
    assert make_mask(1, 9, 9, **asked).shape == (1, 1, 4, 9)
    assert make_mask(1, 9, 9, **asked, allow_is_causal_skip=False).shape == (1, 1, 9, 9)
    assert make_mask(1, 9, 9) is None
    assert make_mask(1, 9, 9, allow_is_causal_skip=False).shape == (1, 1, 9, 9)


def test_a_windowed_mask_is_expanded_once_for_all_layers():
    mask = torch.ones(1, 1, 4, 9, dtype=torch.bool)
    assert hf_masks.expand(mask, True) is hf_masks.expand(mask, True)
    assert hf_masks.expand(mask, True)[0, 0].sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    held = weakref.ref(hf_masks.expand(mask, True))
    del mask
    gc.collect()
    assert held() is None


def reference_attention(query, key, value, allowed, scale):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    weights = (query @ key.transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def by_hand(model, allowed, *args, **kwargs):
    """The model's output with attention by hand; `allowed` gives for a module, mask and lengths what may be seen."""

    def attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **rest):
        flag = getattr(module, "is_causal", False) if is_causal is None else is_causal
        length = query.shape[2]
        seen = torch.ones(1, 1, length, length, dtype=torch.bool)
        if attention_mask is not None:
            seen = seen & (attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e4)
        elif flag:
            seen = seen.tril()
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return reference_attention(query, key, value, seen & allowed(module), scale)

    own = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation_internal for key, config in own.items()}
    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", AttentionMaskInterface()["sdpa"])
    try:
        for config in own.values():
            config._attn_implementation_internal = "by_hand"
        return model(*args, **kwargs)
    finally:
        for key, config in own.items():
            config._attn_implementation_internal = before[key]


def kept(handles, length):
    """What patterns keep, by module name; later keys of a causal pattern's blocks are not its matter."""

    def mask(pattern):
        keep = pattern.keep
        if pattern.causal:
            keep = keep | torch.ones_like(keep).triu()
        return keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None, :, :length, :length]

    return {handle.name: mask(handle.pattern) for handle in handles}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mode", ["masked", "sparse"])
def test_prefix_masks_of_four_dimensions_are_honoured(example, kind, mode):
    model, ids = make("llama"), tokens()
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[..., :6] = True
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    handles = attach(model, {"input_ids": ids, "attention_mask": mask} if example else None)
    assert [handle.causal for handle in handles] == [not example] * len(handles)
    set_patterns(handles, mode, density=0.3)
    output = model(ids, attention_mask=mask).logits
    causal = model(ids).logits
    names = {module: name for name, module in model.named_modules()}
    masks = kept(handles, LENGTH)
    detach(model)
    expected = by_hand(model, lambda module: masks[names[module]], ids, attention_mask=mask).logits
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    expected = by_hand(model, lambda module: masks[names[module]], ids).logits
    torch.testing.assert_close(causal, expected, atol=1e-4, rtol=1e-4)
    full = attach(model)
    set_patterns(full, mode, density=1.0)
    pruned_nothing = model(ids, attention_mask=mask).logits
    detach(model)
    torch.testing.assert_close(pruned_nothing, model(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("example", [True, False])
def test_a_text_tower_whose_calls_say_that_they_are_causal_is_causal(example):
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads, config.max_position_embeddings = 4, 64
    model, ids = CLIPTextModel(config).eval(), tokens()
    own = model(ids).last_hidden_state
    handles = attach(model, ids if example else None)
    torch.testing.assert_close(model(ids).last_hidden_state, own)
    for handle in handles:
        handle.probe_block_size = (BLOCK, BLOCK)
    model(ids)
    assert all(handle.causal for handle in handles)
    assert all(float(handle.statistics.sums[0].triu(1).sum()) == 0 for handle in handles)
    for handle in handles:
        handle.probe_block_size = None
    set_patterns(handles, "sparse", density=0.4)
    output = model(ids).last_hidden_state
    masks, names = kept(handles, LENGTH), {module: name for name, module in model.named_modules()}
    detach(model)
    expected = by_hand(model, lambda module: masks[names[module]], ids).last_hidden_state
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["gather", "sdpa", "reference", "triton"])
def test_latent_attention_with_values_of_another_size_is_pruned(backend):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=12, v_head_dim=8,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    model, ids = DeepseekV3ForCausalLM(config).eval(), tokens()
    handles = attach(model, ids)
    set_patterns(handles, "sparse", 0.3, backend)
    if backend == "triton":  # its blocks have 16 tokens or more
        keep = torch.tensor([[True, False], [False, True]]).expand(4, 2, 2)
        for handle in handles:
            handle.pattern = BlockPattern(keep, (16, 16), True, LENGTH, LENGTH)
    output = model(ids, use_cache=False).logits
    masks = {handle.name: handle.pattern.token_mask(LENGTH, LENGTH)[None] for handle in handles}
    names = {module: name for name, module in model.named_modules()}
    parameter = model.model.layers[0].self_attn.kv_b_proj.weight
    grad = torch.autograd.grad(output.square().sum(), parameter)
    with torch.no_grad():
        cache = DynamicCache()
        found = [model(chunk, past_key_values=cache).logits for chunk in ids.split([17, 4, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(found, 1), output, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="4 heads.*latent attention"):
            model(ids[:1], past_key_values=PatternCache(model))
    detach(model)
    expected = by_hand(model, lambda module: masks[names[module]], ids, use_cache=False).logits
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), parameter), atol=1e-3, rtol=1e-3)


def test_a_pickled_config_names_the_models_own_attention_and_pickled_models_keep_their_patterns():
    model, ids = make("llama"), tokens()
    before = model.config._attn_implementation
    set_patterns(attach(model), "sparse", density=0.3)
    pruned = model(ids).logits
    config = pickle.loads(pickle.dumps(model.config))
    assert config._attn_implementation == before
    assert copy.deepcopy(model.config)._attn_implementation == before
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other(ids).logits, pruned)
        assert pickle.loads(pickle.dumps(other.config))._attn_implementation == before
        detach(other)
        assert other.config._attn_implementation == before
    torch.testing.assert_close(model(ids).logits, pruned)
    detach(model)
    assert pickle.loads(pickle.dumps(model.config))._attn_implementation == before
