"""Whether the swap will pay is measured before patterns move."""

import logging

import pytest
import torch

from sparse_prune import AttentionPruner, ConstantSchedule, swap_timer
from sparse_prune.callbacks import KernelSwap
from sparse_prune.callbacks.swap_forecast import SwapForecast, forecast_swap
from sparse_prune.swap_timer import SwapTimer
from support.tiny import LENGTH, TinyModule, batches, pruning, tiny_llama, trainer


def fit(tmp_path, swap, steps=4, **changes):
    callback = pruning(**changes)
    trainer(tmp_path, [callback, swap], steps=steps).fit(TinyModule(), batches())
    return callback


def scripted(monkeypatch, times):
    """Give the forecast these times in place of a clock's; the patterns that it asks for."""
    asked = []

    def time_attention(layer, backends, repeats, pattern, hidden):
        asked.append(pattern)
        return dict(times)

    monkeypatch.setattr(swap_timer, "time_attention", time_attention)
    return asked


def test_who_gains_nothing_is_warned_once_before_the_ramp(tmp_path, monkeypatch, caplog):
    asked = scripted(monkeypatch, {"dense": 1.0, "gather": 2.0})
    fit(tmp_path, KernelSwap())
    (pattern,) = asked  # both layers are of one shape
    assert pattern.sparsity == pytest.approx(0.4, abs=0.02)
    warned = [record for record in caplog.records if "not expected to make this run faster" in record.getMessage()]
    assert len(warned) == 1
    text = warned[0].getMessage()
    assert f"at 40% sparsity and {LENGTH} tokens, attention like that of model.model.layers.0.self_attn" in text
    assert "(2 layers) measures dense 1 ms, gather 2 ms" in text


def test_a_gain_is_told_without_a_warning(tmp_path, monkeypatch, caplog):
    scripted(monkeypatch, {"dense": 2.0, "gather": 1.0})
    with caplog.at_level(logging.INFO):
        fit(tmp_path, KernelSwap())
    assert "measures dense 2 ms, gather 1 ms" in caplog.text
    assert "not expected to make this run faster" not in caplog.text


@pytest.mark.parametrize(
    ("times", "gains"),
    [({}, True), ({"dense": 1.0}, True), ({"gather": 1.0}, True), ({"dense": 1.0, "a": 1.0, "b": 0.9}, True)]
    + [({"dense": 1.0, "gather": 1.0}, False)],
)
def test_only_what_was_compared_can_fail_to_gain(times, gains):
    assert SwapForecast("layer", 1, 64, 0.5, times).gains == gains


def test_a_named_backend_needs_no_forecast(tmp_path, monkeypatch):
    asked = scripted(monkeypatch, {})
    fit(tmp_path, KernelSwap("sdpa"))
    assert not asked


def test_a_resumed_run_does_not_measure_again_and_another_run_does(tmp_path, monkeypatch):
    asked, swap = scripted(monkeypatch, {}), KernelSwap()
    fit(tmp_path, swap)
    resumed = KernelSwap()
    resumed.load_state(swap.state())
    fit(tmp_path, resumed)
    assert len(asked) == 2  # another module: another run
    assert not swap.state()["forecast_due"]


def test_times_are_real_and_of_every_shape():
    model = tiny_llama()
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=8)
    pruner.attach(model)
    tokens = torch.randint(0, 32, (2, 64))
    model(input_ids=tokens, use_cache=False).logits.sum().backward()
    (forecast,) = forecast_swap(pruner, SwapTimer(tuning_seconds=0.0))
    assert list(forecast.measured_ms) == ["dense", "gather"]
    assert all(0 < ms < 10_000 for ms in forecast.measured_ms.values())
    assert (forecast.layers, forecast.tokens) == (2, 64)
    first = next(iter(pruner.layers.values())).layer
    first.last_shape = first.last_shape._replace(q_len=32, kv_len=32)
    assert [(found.layers, found.tokens) for found in forecast_swap(pruner, SwapTimer(tuning_seconds=0.0))] == [
        (1, 32),
        (1, 64),
    ]


def test_thresholds_tell_no_sparsity():
    pruner = AttentionPruner(threshold=ConstantSchedule(final=0.1), block_size=8)
    pruner.attach(tiny_llama())
    assert forecast_swap(pruner, SwapTimer(tuning_seconds=0.0)) == []
