"""Retrieval probes in words: questions on facts that are hidden in a batch's own text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_prune.evaluation.tasks import TASKS, build
from sparse_prune.retrieval.probes import RetrievalProbe

ASKED = ("passkey", "needle", "multi_query", "key_value")
"""The tasks that are asked; their wordings are those for choosing, which no test uses."""


def text_probes(tokenizer: Any, sequences: Tensor, count: int, seed: int = 0) -> list[RetrievalProbe]:
    """The retrieval tasks of `sparse_prune.evaluation` in turn, facts at all depths, in the wordings for choosing.

    All questions on a text stand behind it, one after the other, each with its answer: one pass asks them all.

    Args:
        tokenizer: A transformers tokenizer, that of the model.
        sequences: Tokens of texts to hide facts in, int64, (batch, length).
        count: Probes, each as long as a text.
        seed: Of names, numbers, wordings and depths.

    Raises:
        ValueError: If the facts and the questions do not fit a sequence's length.
    """
    rows, length = sequences.tolist(), sequences.shape[1]
    tasks = [replace(TASKS[kind], turns=True) for kind in ASKED]
    probes = []
    for index in range(count):
        task = tasks[index % len(tasks)]
        depth = (0.5 + index * 0.618) % 1.0  # spread over the text, however many there are
        example = build(task, tokenizer, rows[index % len(rows)], length, depth, seed * 100_003 + index, "choose")
        tokens, answers = list(example.context), list[int]()
        for question in example.questions:
            tokens += question.tokens + question.answer
            answers += range(len(tokens) - len(question.answer), len(tokens))
        probes.append(RetrievalProbe(task.name, torch.tensor(tokens), torch.tensor(answers)))
    return probes
