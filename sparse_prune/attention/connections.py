"""The same weights with every connection, or without dropout, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from sparse_prune.attention.layer import PrunableAttention


@contextmanager
def unpruned(handles: Iterable[PrunableAttention]) -> Iterator[None]:
    """Inside, the layers apply no pattern and are not probed."""
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
    """Inside, a model is in eval mode; after it, each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
