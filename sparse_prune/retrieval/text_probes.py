"""Retrieval probes in words: questions on facts that are hidden in a batch's own text."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_prune.evaluation.tasks import build
from sparse_prune.evaluation.tasks.needles import mixed
from sparse_prune.retrieval.probes import Ask, RetrievalProbe, retrieval_probes

_MOST = 8  # facts of a probe
_PER_FACT = 128  # tokens of a probe, so that there is text between the facts


def text_probes(tokenizer: Any, sequences: Tensor, count: int, seed: int = 0) -> list[RetrievalProbe]:
    """Hide facts at all depths of texts, in many wordings, which are those for choosing that no test uses.

    Each text hides a fact per 128 tokens, at most eight. Their questions stand behind it, one after the other, each
    with its answer: one pass asks them all.

    Args:
        tokenizer: A transformers tokenizer, that of the model.
        sequences: Tokens of texts to hide facts in, int64, (batch, length).
        count: Probes, each as long as a text.
        seed: Of names, numbers, wordings and depths.

    Raises:
        ValueError: If the facts and the questions do not fit a sequence's length.
    """
    rows, length = sequences.tolist(), sequences.shape[1]
    task = mixed(min(max(length // _PER_FACT, 1), _MOST))
    probes = []
    for index in range(count):
        depth = (0.5 + (seed + index) * 0.618) % 1.0  # spread over the text, however many there are
        example = build(task, tokenizer, rows[index % len(rows)], length, depth, seed * 100_003 + index, "choose")
        tokens, answers = list(example.context), list[int]()
        for question in example.questions:
            tokens += question.tokens + question.answer
            answers += range(len(tokens) - len(question.answer), len(tokens))
        probes.append(RetrievalProbe(task.name, torch.tensor(tokens), torch.tensor(answers)))
    return probes


def questions_by(tokenizer: object) -> Ask:
    """Return what asks in words, if this is a tokenizer of transformers; else what asks with tokens alone."""
    transformers = sys.modules.get("transformers")  # who has a tokenizer has imported it
    if transformers is not None and isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return partial(text_probes, tokenizer)
    return retrieval_probes
