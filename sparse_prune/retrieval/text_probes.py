"""Retrieval probes in words: questions on facts that are hidden in a batch's own text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_prune.evaluation.tasks import TASKS, build
from sparse_prune.retrieval.probes import RetrievalProbe

ASKED = ("passkey", "needle", "multi_key", "key_value")
"""The tasks that are asked; their wordings are those for choosing, which no test uses."""


def text_probes(tokenizer: Any, sequences: Tensor, count: int, seed: int = 0) -> list[RetrievalProbe]:
    """The retrieval tasks of `sparse_prune.evaluation` in turn, facts at all depths, in the wordings for choosing.

    Args:
        tokenizer: A transformers tokenizer, that of the model.
        sequences: Tokens of texts to hide facts in, int64, (batch, length).
        count: Probes.
        seed: Of names, numbers, wordings and depths.

    Raises:
        ValueError: If the facts and the question do not fit a sequence's length.
    """
    rows, length = sequences.tolist(), sequences.shape[1]
    probes = []
    for index in range(count):
        kind, turn = ASKED[index % len(ASKED)], index // len(ASKED)
        depth = (0.5 + turn * 0.618) % 1.0  # spread over the text, however many there are
        example = build(TASKS[kind], tokenizer, rows[turn % len(rows)], length, depth, seed * 1000 + index, "choose")
        question = example.questions[0]
        tokens = torch.tensor(example.context + question.tokens + question.answer)
        answers = torch.arange(len(tokens) - len(question.answer), len(tokens))
        probes.append(RetrievalProbe(kind, tokens, answers))
    return probes
