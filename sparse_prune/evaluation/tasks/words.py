"""Chains and counts: variable tracking, common words and frequent words."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from sparse_prune.evaluation.tasks.pools import VARIABLES, WORDS, number
from sparse_prune.evaluation.tasks.task import Facts, Split, Task, Wording


def _tracking(random: Random, wording: Wording, split: Split) -> Facts:
    first, second, third = random.sample(VARIABLES[split], 3)
    value = number(random, split)
    links = ((first, value), (second, first), (third, second))
    facts = [wording.fact.format(name=name, value=what) for name, what in links]
    return Facts(facts, [(wording.question.format(name=third), f" {value}", None)], ordered=True)


def _counts(shares: tuple[float, ...]) -> Callable[[Random, Wording, Split], Facts]:
    def make(random: Random, wording: Wording, split: Split) -> Facts:
        pool = WORDS[split].split()
        words = random.sample(pool, len(pool))
        rest = (1.0 - sum(shares)) / (len(words) - len(shares))
        weights = [*shares, *[rest] * (len(words) - len(shares))]

        def filler(count: int) -> str:
            return "".join(wording.fact.format(word=word) for word in random.choices(words, weights, k=count))

        answer = ",".join(f" {word}" for word in words[: len(shares)])
        return Facts([], [(wording.question, answer, None)], filler)

    return make


FAMILY = (
    Task(
        "variable_tracking",
        (Wording("\nset {name} to {value}\n", "\nAfter all steps the number in {name} is"),),
        (Wording("\nVAR {name} = {value}\n", "\nThe final value of VAR {name} is"),),
        _tracking,
    ),
    Task(
        "common_words",
        (Wording(" {word}", "\nThe word seen most often above is"),),
        (Wording(" {word},", "\nThe most common word of the list is"),),
        _counts((0.45,)),
    ),
    Task(
        "frequent_words",
        (Wording(" {word}", "\nThe three words seen most often above, in order, are"),),
        (Wording(" {word},", "\nThe three most frequent words of the list are"),),
        _counts((0.4, 0.24, 0.14)),
    ),
)
