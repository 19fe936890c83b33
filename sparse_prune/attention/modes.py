"""Context managers that switch a model to all its connections, or to eval mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sparse_prune.attention.handles import handles_in


@contextmanager
def all_connections(model: nn.Module) -> Iterator[None]:
    """Let a model attend by all its connections inside the block, and probe nothing; without patterns it stays."""
    layers = list(handles_in(model).values())
    before = [(layer.mode, layer.probe_block_size) for layer in layers]
    try:
        for layer in layers:
            layer.mode, layer.probe_block_size = "dense", None
        yield
    finally:
        for layer, (mode, probe) in zip(layers, before, strict=True):
            layer.mode, layer.probe_block_size = mode, probe


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block; afterwards each of its modules has its former mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
