import logging

import pytest
import torch

from sparse_prune import BlockPattern
from sparse_prune.attention import CallShape, PrunableAttention, measure


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
    assert "not measured with triton: `block_size` must hold the factor 16" in caplog.text


def test_configurations_are_found_before_the_clock_runs(layer, monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "tune", lambda layer, backend: calls.append(backend))
    monkeypatch.setattr(measure, "_milliseconds", lambda attend, inputs: calls.append("run") or 1.0)
    measure.time_attention(layer, ["gather"], repeats=1, tuned=True)
    assert calls == ["gather", "run", "run", "run", "run"]
    calls.clear()
    measure.time_attention(layer, ["gather"], repeats=1)
    assert "gather" not in calls
