"""Repeats passages of a text, so that attention has something to look up."""

from __future__ import annotations

import random

from torch import Tensor

_SHORTEST, _LONGEST = 16, 64


def repeat_passages(sequences: Tensor, every: int, seed: int = 0) -> Tensor:
    """Fill the second half of every n-th sequence, from the first on, with passages of what stands before them.

    A passage of 16 to 64 tokens may begin anywhere before the place that it is copied to. Heads that copy then look
    back over all distances, and their blocks get scores that keep them (docs/retrieval.md).

    Args:
        sequences: Tokens, int64, (sequences, length).
        every: 1: all of them.
        seed: Which passages.

    Returns:
        A copy.
    """
    repeated, choice = sequences.clone(), random.Random(seed)
    for sequence in repeated[::every]:
        place = len(sequence) // 2
        while place < len(sequence):
            size = min(choice.randrange(_SHORTEST, _LONGEST + 1), place, len(sequence) - place)
            start = choice.randrange(place - size + 1)
            sequence[place : place + size] = sequence[start : start + size].clone()
            place += size
    return repeated
