"""What both pruning callbacks measure a swap with."""

import torch

from sparse_prune import swap_timer
from sparse_prune.attention import PrunableAttention
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import AttentionOptions
from sparse_prune.swap_timer import SwapTimer


def test_every_backend_that_skips_is_timed_and_the_time_taken_is_counted(monkeypatch):
    layer = PrunableAttention("layer", 2, 2, causal=True)
    layer.pattern = random_pattern(2, 64, 16, density=0.5)
    layer.attend(*torch.randn(3, 1, 2, 64, 16), AttentionOptions(), dense=lambda: None)
    seconds = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(swap_timer, "now", lambda device: next(seconds))
    timer = SwapTimer()
    assert list(timer.times(layer)) == ["dense", "gather"]
    timer.times(layer)
    assert timer.seconds == 6.0
