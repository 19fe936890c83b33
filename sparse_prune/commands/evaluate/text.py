"""The text to evaluate on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_prune.recipes.base.rows import PREFIX
from sparse_prune.recipes.causal_lm.documents import all_documents, split_text
from sparse_prune.recipes.causal_lm.sequences import make_sequences


def held_out(tokenizer: Any, text: str, length: int, count: int) -> Tensor:
    """Sequences of text that a model was not trained on.

    Args:
        tokenizer: A transformers tokenizer.
        text: A file, table, folder or glob, all of which is taken; of "stdlib" and `hub:NAME[:CONFIG[:COLUMN]]`, on
            which the causal_lm recipe trains, the test documents that it holds out.
        length: Tokens per sequence.
        count: Sequences; fewer if there is not so much text.

    Returns:
        int64, (sequences, length).

    Raises:
        ValueError: If nothing is found or the text is too short.
    """
    trained_on = text == "stdlib" or text.startswith(PREFIX)
    chosen = split_text(text)["test"] if trained_on else all_documents(text)
    return make_sequences(tokenizer, chosen, length, count, "to evaluate on", "lengths").input_ids
