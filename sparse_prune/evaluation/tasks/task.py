"""The description of a task, and the examples that hide its facts in a given number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Split = Literal["choose", "test"]


@dataclass(frozen=True)
class Question:
    """One question on a context."""

    tokens: list[int]
    """The question, which follows the context."""
    answer: list[int]
    """The right answer, which follows the question."""
    depth: float | None
    """Place of the fact in the context, in [0, 1]; None if the whole context matters."""


@dataclass(frozen=True)
class Example:
    """A long context and the questions on it, each of which follows the same context."""

    context: list[int]
    """Tokens that one prefill reads."""
    questions: list[Question]
    """At least one."""
    turns: bool
    """Whether the questions follow one another, answers included, and not each the bare context."""


@dataclass(frozen=True)
class Wording:
    """The wording of a task: format strings, with fields that the task fills."""

    fact: str
    question: str


@dataclass(frozen=True)
class Facts:
    """The facts and questions of one example, as text."""

    facts: list[str]
    """The texts to hide, spread over the context."""
    asks: list[tuple[str, str, int | None]]
    """Question, answer, and which fact tells the answer; None if all do."""
    filler: Callable[[int], str] | None = None
    """Text of at least so many words that replaces the caller's filler."""
    ordered: bool = False
    """Whether the facts stand in their order, as the links of a chain must."""


@dataclass(frozen=True)
class Task:
    """One kind of question."""

    name: str
    choose: tuple[Wording, ...]
    """Wordings for choosing patterns and for training."""
    test: tuple[Wording, ...]
    """Wordings that only tests use."""
    make: Callable[[Random, Wording, Split], Facts]
    """Draws one example from the pools of a split."""
    turns: bool = False
    """As in `Example`."""

    def wordings(self, split: Split) -> tuple[Wording, ...]:
        """Return the wordings of a split.

        Raises:
            ValueError: If the split is unknown.
        """
        if split not in ("choose", "test"):
            raise ValueError(f"`split` must be 'choose' or 'test', got {split!r}. Test with 'test' only.")
        return self.choose if split == "choose" else self.test


def build(
    task: Task, tokenizer: Any, filler: Sequence[int], length: int, depth: float, seed: int, split: Split = "test"
) -> Example:
    """Build one example whose context and longest end take exactly `length` tokens together.

    Args:
        task: One of `TASKS`.
        tokenizer: A transformers tokenizer; no special tokens are added.
        filler: Tokens of a text to hide facts in; repeated if there are too few.
        length: Tokens. The end is a question with its answer, or all of them if they are turns.
        depth: Place of the first fact, in [0, 1]; others follow at even distances and wrap around. Ordered facts take
            the same places from the start on.
        seed: Seed of names, numbers and the wording.
        split: "test", or "choose": wordings, names, words and numbers of choosing and testing differ.

    Raises:
        ValueError: If an argument is out of range, the filler is empty or the facts do not fit.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"`depth` must lie in [0, 1], got {depth}. 0 hides at the start, 1 before the question.")
    if not filler:
        raise ValueError("`filler` must hold tokens, got none. Give it text.")
    random = Random(f"{task.name} {seed}")
    parts = task.make(random, random.choice(task.wordings(split)), split)

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    facts, count = [encode(fact) for fact in parts.facts], max(len(parts.facts), 1)
    depths = [depth if count == 1 else (depth + index / count) % 1.0 for index in range(count)]
    if parts.ordered:
        depths.sort()
    ends = [(encode(question), encode(answer), fact) for question, answer, fact in parts.asks]
    sizes = [len(question) + len(answer) for question, answer, _ in ends]
    room = length - sum(map(len, facts)) - (sum(sizes) if task.turns else max(sizes))
    if room < 0:
        raise ValueError(f"`length` must be at least {length - room} tokens for {task.name}, got {length}. Raise it.")
    text = list(filler) if parts.filler is None else encode(parts.filler(room + 1))
    text = (text * (room // len(text) + 1))[:room]
    context: list[int] = []
    done = 0
    for place, fact in sorted((int(where * room), index) for index, where in enumerate(depths[: len(facts)])):
        context += text[done:place] + facts[fact]
        done = place
    context += text[done:]
    questions = [Question(ask, answer, None if fact is None else depths[fact]) for ask, answer, fact in ends]
    return Example(context, questions, task.turns)
