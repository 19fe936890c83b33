"""Watches what a model's attention layers do in calls that are not of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_prune.attention import PrunableAttention
from sparse_prune.attention.modes import evaluating
from sparse_prune.retrieval.probes import RetrievalProbe
from sparse_prune.scores import BlockStatistics, Score

_KEPT = ("mode", "mass", "score", "probe_block_size", "gradient_scale", "statistics", "score_sums", "last_shape")


@torch.no_grad()
def look_at(
    model: nn.Module,
    call: Callable[[Tensor], object],
    handles: Iterable[PrunableAttention],
    sequences: Iterable[Tensor],
    block_size: tuple[int, int],
    kind: str = "max",
) -> dict[str, BlockStatistics]:
    """Block statistics of a model's calls, such as a probe collects in training, with all connections.

    Args:
        model: What is called. It is put into eval mode meanwhile.
        call: Calls it with tokens, int64, (1, length).
        handles: Its layers. Scores of their own that need no gradient are collected, too.
        sequences: Tokens, int64, (length,) each.
        block_size: Tokens per block side, (query, key).
        kind: Which of the statistics to return, or the `kind` of the layers' own score.

    Returns:
        Layer -> statistics over all sequences, on the CPU, without the layers that no call reached.
    """
    layers, found = list(handles), dict[str, BlockStatistics]()
    with watched(layers, block_size), evaluating(model):
        for tokens in sequences:
            call(tokens[None])
        for layer in layers:
            seen = layer.take_statistics((kind,))
            if seen is not None:
                found[layer.name] = seen
    return found


def look_back(
    model: nn.Module,
    call: Callable[[Tensor], object],
    handles: Iterable[PrunableAttention],
    questions: Iterable[RetrievalProbe],
    repeats: Iterable[Tensor],
    block_size: tuple[int, int],
    kind: str = "max",
) -> Iterator[tuple[dict[str, BlockStatistics], str]]:
    """Yield what a model looks at to answer questions, then what it looks at in texts that repeat passages.

    Each comes with its topic, as `AttentionPruner.ask` takes it.

    Args:
        model: As `look_at` takes it, like all that is not said here.
        call: Calls it.
        handles: Its layers.
        questions: At least one.
        repeats: Tokens, int64, (length,) each (`repeat_passages`).
        block_size: Tokens per block side, (query, key).
        kind: Which of the statistics to return.
    """
    layers = list(handles)
    asked = [question.tokens for question in questions]
    for topic, sequences in (("questions", asked), ("repeats", repeats)):
        yield look_at(model, call, layers, sequences, block_size, kind), topic


@contextmanager
def watched(
    layers: Sequence[PrunableAttention], block_size: tuple[int, int], alone: Score | None = None
) -> Iterator[None]:
    """Inside, layers compute with all connections and are probed; what they had collected is theirs again afterwards.

    Args:
        layers: Any.
        block_size: Tokens per block side, (query, key).
        alone: A score to collect in place of row mass and of the layers' own scores.
    """
    before = [{name: getattr(layer, name) for name in _KEPT} for layer in layers]
    inside: dict[str, Any] = {"mode": "dense", "probe_block_size": block_size, "gradient_scale": 1.0}
    inside |= {"statistics": None, "score_sums": None}
    if alone is not None:
        inside |= {"mass": False, "score": alone}
    try:
        for layer in layers:
            vars(layer).update(inside)
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            vars(layer).update(state)
