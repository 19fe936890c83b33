"""Puts facts and questions on them into text, so that attention has something to look up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_prune.recipes.causal_lm.chats import IGNORED
from sparse_prune.recipes.causal_lm.sequences import Sequences
from sparse_prune.retrieval import text_probes


def with_questions(examples: Sequences, tokenizer: Any, share: float, seed: int = 0) -> Sequences:
    """Hide facts in a share of the sequences and ask for them at the end; of these only the answers count in the loss.

    The wordings, names and numbers are those that no test of `sparse_prune.evaluation` uses (`text_probes`).

    Args:
        examples: Sequences of joined documents, not of packed ones.
        tokenizer: The tokenizer of transformers that made them.
        share: Share of the sequences that get facts, at even distances, in [0, 1].
        seed: Seed of facts and wordings.

    Returns:
        The same number of sequences, of the same length.

    Raises:
        ValueError: If there are too few sequences for the share, or facts and questions do not fit their length.
    """
    chosen = [index for index in range(len(examples)) if int((index + 1) * share) > int(index * share)]
    if not chosen:
        raise ValueError(
            f"`question_share` must be at least 1 / {len(examples)} of the training sequences, got {share}. Raise it."
        )
    ids, labels = examples.input_ids.clone(), examples.labels.clone()
    for index, probe in zip(chosen, text_probes(tokenizer, ids[chosen], len(chosen), seed), strict=True):
        ids[index], labels[index] = probe.tokens, IGNORED
        labels[index, probe.answers] = probe.tokens[probe.answers]
    return replace(examples, input_ids=ids, labels=labels)
