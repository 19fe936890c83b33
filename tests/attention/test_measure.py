import logging

import pytest
import torch

from sparse_prune import BlockPattern
from sparse_prune.attention import CallShape, PrunableAttention, measure
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
    monkeypatch.setattr(measure, "_milliseconds", lambda attend, inputs: next(script))
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
    monkeypatch.setitem(BACKENDS, "gather", lambda *call: seen.append(call[-1]) or gather(*call))
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
        return gather(*call)

    monkeypatch.setitem(BACKENDS, "flex", fail_in_the_end)
    assert list(measure.time_attention(layer, ["flex", "gather"])) == ["dense", "gather"]
    assert "layer: not measured with flex: OutOfMemoryError: out of memory" in caplog.text


def test_configurations_are_found_before_the_clock_runs(layer, monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "tune", lambda layer, backend, pattern: calls.append(backend))
    monkeypatch.setattr(measure, "_milliseconds", lambda attend, inputs: calls.append("run") or 1.0)
    measure.time_attention(layer, ["gather"], repeats=1, tuned=True)
    assert calls == ["gather", "run", "run", "run", "run"]
    calls.clear()
    measure.time_attention(layer, ["gather"], repeats=1)
    assert "gather" not in calls
