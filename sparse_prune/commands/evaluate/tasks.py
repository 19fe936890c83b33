"""The retrieval tasks that `sparse-prune evaluate` asks both models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from sparse_prune.evaluation import TASKS, fresh_cache, measure_task
from sparse_prune.evaluation.meter import TaskScore
from sparse_prune.evaluation.tasks import build
from sparse_prune.ranges import check_range

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asking:
    """Retrieval tasks to ask, and the number of questions.

    Raises:
        ValueError: If `questions` is not positive, or a task does not fit into `length` tokens.
    """

    tokenizer: Any
    """The model's tokenizer."""
    filler: Sequence[int]
    """Tokens of a text to hide facts in."""
    names: Sequence[str]
    """Keys of `TASKS`."""
    length: int
    """Tokens of a prompt with its answer."""
    questions: int
    """Smallest number of questions per task."""
    depths: Sequence[float]
    """Positions of facts in the text, in [0, 1], used in turn."""

    def __post_init__(self) -> None:
        check_range("[1, inf)", questions=self.questions)
        for name, depth in product(self.names, self.depths):
            build(TASKS[name], self.tokenizer, self.filler, self.length, depth, 0)

    def ask(self, model: Any) -> dict[str, TaskScore]:
        """Score a model in every task, through its cache."""
        scores = {}
        for name in self.names:
            scores[name] = measure_task(
                model, self.tokenizer, TASKS[name], self.filler, self.length, partial(fresh_cache, model),
                self.questions, self.depths,
            )  # fmt: skip
            log.info("%s: %.0f %% right", name, 100 * scores[name].accuracy)
        return scores
