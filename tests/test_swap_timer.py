"""What both pruning callbacks measure a swap with."""

import pytest
import torch

from sparse_prune import swap_timer
from sparse_prune.attention import PrunableAttention
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import AttentionOptions
from sparse_prune.swap_timer import SwapTimer


def prunable():
    layer = PrunableAttention("layer", 2, 2, causal=True)
    layer.pattern = random_pattern(2, 64, 16, density=0.5)
    layer.attend(*torch.randn(3, 1, 2, 64, 16), AttentionOptions(), dense=lambda: None)
    return layer


def test_every_backend_that_skips_is_timed_and_the_time_taken_is_counted(monkeypatch):
    layer, seconds = prunable(), iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(swap_timer, "now", lambda device: next(seconds))
    timer = SwapTimer(tuning_seconds=0.0)
    assert list(timer.times(layer)) == ["dense", "gather"]
    timer.times(layer)
    assert timer.seconds == 6.0


def test_configurations_are_looked_for_within_a_limit_that_all_layers_share(monkeypatch):
    clock, limits = [0.0], []

    def tune(layer, backends, seconds, pattern):
        limits.append(seconds)
        clock[0] += 4.0
        return backends

    monkeypatch.setattr(swap_timer, "now", lambda device: clock[0])
    monkeypatch.setattr(swap_timer, "tune", tune)
    monkeypatch.setattr(swap_timer, "time_attention", lambda *call: {})
    timer, layer = SwapTimer(), prunable()
    for _ in range(4):
        timer.times(layer)
    assert limits == [10.0, 6.0, 2.0]
    with pytest.raises(ValueError, match="`tuning_seconds` must be at least 0, got -1"):
        SwapTimer(-1)
