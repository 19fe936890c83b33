import logging
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import BlockPattern
from sparse_prune.attention import CallShape, PrunableAttention, attach, measure
from sparse_prune.kernels import BACKENDS, AttentionOptions


@pytest.fixture
def layer():
    layer = PrunableAttention("layer", num_heads=4, num_kv_heads=2, causal=True)
    layer.pattern = BlockPattern.dense(4, 64, 64, 8, causal=True)
    layer.last_shape = CallShape(1, 64, 64, 16, torch.float32, torch.device("cpu"))
    return layer


def test_times_are_of_every_candidate_and_real(layer):
    times = measure.time_attention(layer, ["gather", "sdpa"])
    assert list(times) == ["dense", "gather", "sdpa"]
    assert all(0 < ms < 10_000 for ms in times.values())


def test_candidates_take_turns_and_a_disturbed_turn_does_not_count(layer, monkeypatch):
    script = iter([0.0, 0.0, 3.0, 50.0, 90.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(measure, "milliseconds", lambda run, device, hidden: next(script))
    assert measure.time_attention(layer, ["gather"]) == {"dense": 3.0, "gather": 2.0}


def test_a_backend_that_refuses_is_passed_over(layer, caplog):
    with caplog.at_level(logging.INFO):
        times = measure.time_attention(layer, ["triton", "gather"])
    assert list(times) == ["dense", "gather"]
    assert "not measured with triton: ValueError: `block_size` must hold the factor 16" in caplog.text


def test_candidates_do_what_the_training_call_asked_for(layer, monkeypatch, caplog):
    padding, seen = torch.rand(1, 64) < 0.5, []
    asked = AttentionOptions(scale=0.5, key_mask=padding, dropout_p=0.1, seed=3)
    layer.attend(*measure._inputs(layer), asked, dense=lambda: None)
    assert layer.last_shape.options.key_mask.is_meta  # a mask is not kept alive
    gather = BACKENDS["gather"]
    monkeypatch.setitem(
        BACKENDS, "gather", replace(gather, attend=lambda *call: seen.append(call[-1]) or gather.attend(*call))
    )
    with caplog.at_level(logging.INFO):
        assert list(measure.time_attention(layer, ["flex", "gather"])) == ["dense", "gather"]
    assert "Backend 'flex' has no dropout" in caplog.text
    assert (seen[0].scale, seen[0].dropout_p, seen[0].key_mask.shape) == (0.5, 0.1, padding.shape)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(),
        AttentionOptions(scale=0.5, key_mask=torch.ones(1, 64, dtype=torch.bool)),
        AttentionOptions(softcap=2.0),
    ],
)
def test_the_dense_candidate_computes_what_a_full_pattern_does(layer, options):
    layer.last_shape = layer.last_shape._replace(options=options)
    inputs = measure._inputs(layer)
    dense, gather = (measure._attention(layer, backend, layer.pattern, *inputs)() for backend in ("dense", "gather"))
    torch.testing.assert_close(dense, gather)


@pytest.mark.parametrize("runs", [0, 2])
def test_a_candidate_that_fails_is_left_out(layer, monkeypatch, caplog, runs):
    gather, left = BACKENDS["gather"], [None] * runs

    def fail_in_the_end(*call):
        if not left:
            raise torch.OutOfMemoryError("out of memory")
        left.pop()
        return gather.attend(*call)

    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], attend=fail_in_the_end))
    assert list(measure.time_attention(layer, ["flex", "gather"])) == ["dense", "gather"]
    assert "layer: not measured with flex: OutOfMemoryError: out of memory" in caplog.text


@pytest.mark.parametrize(
    ("repeats_keys", "options", "head_dim", "shared"),
    [
        (True, AttentionOptions(), 16, True),
        (True, AttentionOptions(), 272, False),
        (True, AttentionOptions(key_mask=torch.ones(1, 64, dtype=torch.bool)), 16, False),
        (False, AttentionOptions(key_mask=torch.ones(1, 64, dtype=torch.bool)), 16, True),
    ],
)
def test_dense_attention_shares_keys_where_the_model_does(layer, monkeypatch, repeats_keys, options, head_dim, shared):
    calls, sdpa = [], measure.F.scaled_dot_product_attention

    def watched(query, key, *args, enable_gqa, **kwargs):
        calls.append((key.shape[1], enable_gqa))
        return sdpa(query, key, *args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(measure.F, "scaled_dot_product_attention", watched)
    layer.repeats_keys = repeats_keys
    layer.last_shape = layer.last_shape._replace(options=options, head_dim=head_dim)
    measure._attention(layer, "dense", layer.pattern, *measure._inputs(layer))()
    assert calls == [(2, True) if shared else (4, False)]


@pytest.mark.parametrize("padded", [False, True])
def test_dense_attention_is_called_as_transformers_calls_it(monkeypatch, padded):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))
    (layer,) = attach(model)
    calls, sdpa = [], measure.F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        calls.append((key.shape, None if attn_mask is None else attn_mask.shape, is_causal, enable_gqa))
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    monkeypatch.setattr(measure.F, "scaled_dot_product_attention", watched)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, : 5 * padded] = 0
    model(torch.ones_like(mask), attention_mask=mask, use_cache=False)
    measure._attention(layer, "dense", None, *measure._inputs(layer))()
    assert calls[0] == calls[1]


def test_configurations_are_found_for_what_the_layer_asks(layer, monkeypatch):
    attend, tuning = (pytest.importorskip(f"sparse_prune.kernels.triton.{name}") for name in ("attend", "tuning"))
    asked = []
    monkeypatch.setattr(attend, "check_supported", lambda query: None)
    monkeypatch.setattr(tuning, "tune", lambda *call, seconds: asked.append((call[4], seconds)))
    layer.last_shape = layer.last_shape._replace(
        options=AttentionOptions(softcap=2.0, key_mask=torch.ones(1, 64).bool())
    )
    assert measure.tune(layer, ["gather", "triton"], 3.0) == ["gather", "triton"]
    ((options, seconds),) = asked
    assert (options.softcap, options.key_mask.shape) == (2.0, (1, 64))
    assert 0.0 < seconds <= 3.0
