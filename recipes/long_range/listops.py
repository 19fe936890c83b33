"""Generates expressions of ListOps by the rules that Long Range Arena publishes.

Nested lists of digits under MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10). An element is a list
with probability 0.25, above the deepest level; a list has 2 to `max_args` elements (arXiv:2011.04006 and its generator,
lra_benchmarks/data/listops.py in github.com/google-research/long-range-arena; the task is of arXiv:1804.06028).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

END = "]"
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
DIGITS = tuple(str(digit) for digit in range(10))
LIST_PROBABILITY = 0.25


@dataclass(frozen=True)
class Rules:
    """Bounds of the expressions; the defaults are those of Long Range Arena.

    Raises:
        ValueError: If no expression is within the bounds.
    """

    min_length: int = 500
    """Expressions are longer than this, in tokens: operators, digits and closing brackets."""
    max_length: int = 2000
    """Expressions are shorter than this."""
    max_depth: int = 10
    """Levels, the outermost included."""
    max_args: int = 10
    """Most elements of a list."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_length < self.max_length - 1:
            raise ValueError(
                f"`min_length` must be at least 0 and two less than `max_length`, got {self.min_length} and "
                f"{self.max_length}. Raise `max_length`."
            )
        if self.max_depth < 2 or self.max_args < 2:
            raise ValueError(f"`max_depth` and `max_args` must be at least 2, got {self.max_depth}, {self.max_args}.")


def generate(count: int, rules: Rules, seed: int) -> list[tuple[tuple[str, ...], int]]:
    """Generate distinct expressions and their values."""
    chance = random.Random(seed)
    found: dict[tuple[str, ...], int] = {}
    while len(found) < count:
        tokens: list[str] = []
        try:
            value = _grow(chance, 1, rules, tokens)
        except _TooLong:
            continue
        if rules.min_length < len(tokens) < rules.max_length:
            found.setdefault(tuple(tokens), value)
    return list(found.items())


class _TooLong(Exception):
    pass


def _grow(chance: random.Random, depth: int, rules: Rules, tokens: list[str]) -> int:
    """Append an expression; return its value. Raises as soon as it is too long."""
    if len(tokens) >= rules.max_length:
        raise _TooLong
    if depth >= rules.max_depth or chance.random() > LIST_PROBABILITY:
        digit = chance.randrange(10)
        tokens.append(DIGITS[digit])
        return digit
    operator = chance.choice(tuple(OPERATORS))
    tokens.append(operator)
    values = [_grow(chance, depth + 1, rules, tokens) for _ in range(chance.randint(2, rules.max_args))]
    tokens.append(END)
    return OPERATORS[operator](values)
