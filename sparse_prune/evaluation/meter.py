"""Measures how much of a task a model solves, with its interval, by depth, through the cache or without one."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_prune import reports
from sparse_prune.evaluation.prefill import prefilled
from sparse_prune.evaluation.tasks import Example, Question, Task, build
from sparse_prune.evaluation.tasks.task import Split

COUNTS_FROM = 0.8
"""Accuracy of the dense model from which a task counts."""


@dataclass(frozen=True)
class Answered:
    """A model's answer to one question."""

    right: bool
    """Whether every token of the answer came first, with the true answer as input."""
    log_prob: float
    """Log-probability of the true answer, mean over its tokens, nats per token."""
    depth: float | None
    """As in `Question`."""


@dataclass(frozen=True)
class TaskScore:
    """A model's answers to the questions of a task."""

    answers: list[Answered]
    """At least one."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the accuracy at 95 %; questions on one context are taken as independent."""
        return wilson(sum(answer.right for answer in self.answers), len(self.answers))

    @property
    def log_prob(self) -> float:
        """Mean log-probability of the true answers, nats per token."""
        return sum(answer.log_prob for answer in self.answers) / len(self.answers)

    @property
    def numbers(self) -> dict[str, float]:
        """Accuracy, the ends of its interval, log-probability and number of questions, for a file of results."""
        low, high = self.interval
        named = {"accuracy": self.accuracy, "low": low, "high": high, "log_prob": self.log_prob}
        return named | {"questions": len(self.answers)}

    def by_depth(self) -> dict[float | None, TaskScore]:
        """Split the answers by the depth of their facts."""
        depths = dict.fromkeys(answer.depth for answer in self.answers)
        return {depth: TaskScore([a for a in self.answers if a.depth == depth]) for depth in depths}


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval of a share.

    Args:
        right: Successes, at most `count`.
        count: Trials, at least 1.
        z: Width in standard errors; the default covers 95 %.

    Raises:
        ValueError: If a number is out of range.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"`right` must lie in [0, count] and `count` be at least 1, got {right} of {count}.")
    share, extra = right / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / count + extra / count / 4)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def measure_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    filler: Sequence[int],
    length: int,
    make_cache: Callable[[], Any] | None = None,
    prompts: int = 60,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    split: Split = "test",
) -> TaskScore:
    """Ask at least `prompts` questions of one task.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer; it, `filler`, `length` and `split` as in `build`.
        task: One of `TASKS`.
        filler: Tokens of a text.
        length: Tokens of a context with its question and answer.
        make_cache: Makes an empty cache for one sequence, such as `partial(fresh_cache, model)`. None: each question
            reads all that stands before it anew, for models without a cache.
        prompts: Number of questions, at least 1. Through a cache, several questions on one context share its
            prefill, and contexts what they begin with (`prefilled`).
        depths: Where facts lie, in [0, 1], in turn.
        seed: Seed of names, numbers and wordings.
        split: "test", or "choose" for choosing patterns and for training.

    Raises:
        ValueError: As in `build`, or if `prompts` is not positive or there are no depths.
    """
    if prompts < 1 or not depths:
        raise ValueError(f"`prompts` must be at least 1 and `depths` hold one, got {prompts} and {list(depths)}.")
    examples: list[Example] = []
    while sum(len(example.questions) for example in examples) < prompts:
        index = len(examples)
        depth = depths[index % len(depths)]
        examples.append(build(task, tokenizer, filler, length, depth, seed * 1_000_003 + index, split))
    if make_cache is None:
        return TaskScore([found for example in examples for found in answer(model, example)])
    caches = prefilled(model, [example.context for example in examples], make_cache)
    by_index = {index: answer(model, examples[index], cache) for index, cache in caches}
    return TaskScore([found for _, answers in sorted(by_index.items()) for found in answers])


@torch.no_grad()
def answer(model: Any, example: Example, cache: Any = None) -> list[Answered]:
    """Answer an example's questions, with the true answer as input.

    Args:
        model: A transformers causal language model.
        example: A context and its questions.
        cache: A cache that has read the context: keys that it has evicted are missed. None: each question, with all
            that stands before it, has a pass of its own, for models without a cache and for layers that compute as in
            training.
    """
    logits_of = _uncached(model, example) if cache is None else _cached(model, example, cache)
    answers = []
    for question in example.questions:
        target = _row(model, question.answer)[0]
        logits = logits_of(question)[-len(target) - 1 : -1].float()
        mean = logits.log_softmax(-1).gather(1, target[:, None]).mean()
        answers.append(Answered(bool((logits.argmax(-1) == target).all()), float(mean), question.depth))
    return answers


def _cached(model: Any, example: Example, cache: Any) -> Callable[[Question], Tensor]:
    """Make a function that computes the logits of a question and its answer after the context, (tokens, vocabulary)."""

    def logits(question: Question) -> Tensor:
        seen = cache if example.turns else copy.deepcopy(cache)
        inputs = _row(model, question.tokens + question.answer)
        found: Tensor = model(input_ids=inputs, past_key_values=seen).logits[0]
        return found

    return logits


def _uncached(model: Any, example: Example) -> Callable[[Question], Tensor]:
    """Make the function of `_cached` without a cache, for the last tokens alone if the model can be asked for them."""
    before, few = list(example.context), "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(question: Question) -> Tensor:
        end = question.tokens + question.answer
        # Logits of a long context are larger than the model.
        options = {"logits_to_keep": len(end)} if few else {}
        found: Tensor = model(input_ids=_row(model, before + end), use_cache=False, **options).logits[0]
        if example.turns:
            before.extend(end)
        return found

    return logits


def counted(dense: TaskScore) -> bool:
    """Whether a task counts: the dense model solves at least `COUNTS_FROM` of it."""
    return dense.accuracy >= COUNTS_FROM


def table(rows: Iterable[tuple[str, TaskScore, TaskScore]]) -> str:
    """Format a Markdown table: per task its name, the dense model's score and the pruned one's."""
    lines = []
    for name, dense, pruned in rows:
        note = "yes" if counted(dense) else f"not counted, dense solves {dense.accuracy:.0%}"
        lines.append((name, _share(dense), _share(pruned), f"{dense.log_prob:.2f} / {pruned.log_prob:.2f}", note))
    return reports.table(("task", "dense:", "pruned:", "log-probability, nats per token:", "counted"), lines)


def _share(score: TaskScore) -> str:
    low, high = score.interval
    return f"{score.accuracy:.0%} ({low:.0%} to {high:.0%})"


def _row(model: Any, tokens: list[int]) -> Tensor:
    return torch.tensor([tokens], device=model.device)
