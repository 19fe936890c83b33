"""The text to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_prune.recipes.causal_lm.sequences import make_sequences
from sparse_prune.recipes.causal_lm.trained_text import unseen_documents


def held_out(
    tokenizer: Any, text: str | list[str], length: int, count: int, told: Mapping[str, Any] | None = None
) -> tuple[Tensor, str]:
    """Sequences of text that a model was not trained on.

    Args:
        tokenizer: A transformers tokenizer.
        text: Files, tables, folders or globs; "stdlib" or `hub:NAME[:CONFIG[:COLUMN...]]`: see `unseen_documents`.
        length: Tokens per sequence.
        count: Sequences; fewer if there is not so much text.
        told: What the export tells of its training (`describe_split`); None: nothing.

    Returns:
        int64, (sequences, length), and which part of the text they are, in words.

    Raises:
        ValueError: If nothing is found, the text is too short, or a part of it was trained on.
    """
    documents, part = unseen_documents(text, told)
    return make_sequences(tokenizer, documents, length, count, "to evaluate on", "lengths").input_ids, part
