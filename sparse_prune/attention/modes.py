"""Context managers that switch a model to all its connections, or to eval mode, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from sparse_prune.attention.layer import PrunableAttention


@contextmanager
def unpruned(handles: Iterable[PrunableAttention]) -> Iterator[None]:
    """Let layers apply no pattern inside the block, and probe nothing."""
    layers = list(handles)
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
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
