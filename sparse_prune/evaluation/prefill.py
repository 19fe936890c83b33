"""Prefill of contexts that begin alike: what they share is read once."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch


def prefilled(model: Any, contexts: Sequence[list[int]], make_cache: Callable[[], Any]) -> Iterator[tuple[int, Any]]:
    """Prefill each context and yield its index with its cache, which is the caller's own, until none is left.

    The tokens that all remaining contexts begin with pass through the model once. Contexts that hide facts in one text
    share the text before the first fact; those that leave it first come first. Two caches are held at a time.

    Args:
        model: A transformers causal language model.
        contexts: Tokens of each.
        make_cache: Makes an empty cache for one sequence.
    """
    # In the order of their tokens, a context shares most with a neighbour, and the one that shares least is at an end.
    left = deque(sorted(range(len(contexts)), key=contexts.__getitem__))
    alike = deque(_common(contexts[one], contexts[other]) for one, other in pairwise(left))
    trunk, read = make_cache(), 0
    while left:
        shared = min(alike, default=len(contexts[left[0]]))
        _read(model, contexts[left[0]][read:shared], trunk)
        read = shared
        first = bool(alike) and alike[0] < alike[-1]
        index = left.popleft() if first else left.pop()
        if alike:
            alike.popleft() if first else alike.pop()
        cache = copy.deepcopy(trunk) if left else trunk
        _read(model, contexts[index][read:], cache)
        yield index, cache


@torch.no_grad()
def _read(model: Any, tokens: list[int], cache: Any) -> None:
    if tokens:
        model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache, logits_to_keep=1)


def _common(one: list[int], other: list[int]) -> int:
    """Count the tokens at the start that two contexts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
