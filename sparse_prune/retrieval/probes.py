"""Retrieval probes: sequences of a batch's own tokens whose last tokens can only be known by looking far back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_KEY, _VALUE = 3, 4  # tokens
_SHORTEST, _LONGEST = 16, 48  # tokens of a passage
_SURE = 8.0  # logits by which an answer leads, from where on nothing is gained
_GUESSED = 4  # first tokens of a passage, before which nobody knows which one it is
LEAST_LENGTH = 128
"""Tokens of the shortest sequence that has room for the probes."""


@dataclass(frozen=True, eq=False)
class RetrievalProbe:
    """A sequence and which of its tokens are answers."""

    kind: str
    """What is asked; kinds count alike, however many probes each has."""
    tokens: Tensor
    """int64, (length,)."""
    answers: Tensor
    """Places of the answers' tokens, int64, ascending, at least 1."""

    def lead(self, logits: Tensor) -> Tensor:
        """Compute how far the answers lead: the right token's logit less the largest other one, mean over the answers.

        Each lead counts between 0, for a token that was not found, and 8, from where on the model is sure. Its negative
        is a loss whose gradient does not vanish where the model is sure, as that of the cross entropy does.

        Args:
            logits: The model's for `tokens`, (length, vocabulary).
        """
        places = self.answers.to(logits.device)
        rows, target = logits[places - 1].float(), self.tokens.to(logits.device)[places][:, None]
        others = rows.scatter(1, target, -torch.inf).amax(1)
        return (rows.gather(1, target)[:, 0] - others).clamp(0.0, _SURE).mean()


Ask = Callable[[Tensor, int, int], list[RetrievalProbe]]
"""Makes questions of texts, int64, (batch, length), a count and a seed; `retrieval_probes` is one."""


def retrieval_probes(sequences: Tensor, count: int, seed: int = 0) -> list[RetrievalProbe]:
    """Half of them recall, half of them repeat, both over all distances, without a tokenizer.

    Recall: strings of random tokens are bound to others, at places drawn at random, and asked for at the end, 1 to 8
    of them. Repeat: the last quarter is made of passages of the first half.

    Args:
        sequences: Tokens that the model was trained on or is used with, int64, (batch, length).
        count: Probes, at least 2.
        seed: Of all that is drawn.

    Raises:
        ValueError: If sequences are shorter than `LEAST_LENGTH` tokens.
    """
    if sequences.shape[1] < LEAST_LENGTH:
        raise ValueError(
            f"`sequences` must hold at least {LEAST_LENGTH} tokens each for retrieval probes, got "
            f"{sequences.shape[1]}. Use longer ones, or do without `retrieval`."
        )
    random, made = Random(seed), (_recall, _repeat)
    rows = sequences.cpu()
    return [made[index % 2](rows[index // 2 % len(rows)], random) for index in range(count)]


def _recall(text: Tensor, random: Random) -> RetrievalProbe:
    length, pairs = len(text), random.choice((1, 2, 4, 8))
    pairs = min(pairs, length // (8 * (_KEY + _VALUE)))
    vocabulary = torch.unique(text)
    drawn = [_draw(vocabulary, _KEY + _VALUE, random) for _ in range(pairs)]
    room = length - 2 * pairs * (_KEY + _VALUE)
    parts: list[Tensor] = []
    done = 0
    for place, pair in zip(sorted(random.randrange(room) for _ in drawn), drawn, strict=True):
        parts += [text[done:place], pair]
        done = place
    asked = random.sample(drawn, len(drawn))
    tokens = torch.cat([*parts, text[done:room], *asked])
    ends = torch.arange(length - pairs * (_KEY + _VALUE), length).view(pairs, -1)[:, _KEY:]
    return RetrievalProbe("recall", tokens, ends.flatten())


def _draw(vocabulary: Tensor, count: int, random: Random) -> Tensor:
    return vocabulary[[random.randrange(len(vocabulary)) for _ in range(count)]]


def _repeat(text: Tensor, random: Random) -> RetrievalProbe:
    length = len(text)
    parts, answers = [text[: 3 * length // 4]], list[int]()
    for place, size in _passages(3 * length // 4, length, random):
        start = random.randrange(length // 2 - size)
        parts.append(text[start : start + size])
        answers += range(place + _GUESSED, place + size)
    return RetrievalProbe("repeat", torch.cat(parts), torch.tensor(answers))


def _passages(start: int, stop: int, random: Random) -> Iterator[tuple[int, int]]:
    """Place and size of passages that fill what lies between; none is too short to be known again."""
    while start < stop:
        size = random.randrange(_SHORTEST, _LONGEST + 1)
        size = stop - start if stop - start - size < _SHORTEST else size
        yield start, size
        start += size
