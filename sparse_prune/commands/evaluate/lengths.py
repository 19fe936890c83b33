"""The lengths to evaluate at: the default ones, and those that a model supports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_prune.evaluation import handles_of
from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.pretrained import longest_prompt


def lengths_around(model: Any, decode: int = 32) -> list[int]:
    """Return half, once, twice and four times the length that the patterns were learned at, as far as positions reach.

    If the model has a table of positions, it also holds the tokens that are decoded after the longest length.

    Raises:
        ValueError: If there are no patterns, or decoding leaves no room for a prompt.
    """
    learned = max((handle.pattern.kv_len for handle in handles_of(model) if handle.pattern is not None), default=0)
    if not learned:
        raise ValueError("`lengths` must be given for a model without patterns, got none. Give numbers of tokens.")
    longest = getattr(model.config, "max_position_embeddings", None) or 4 * learned
    lengths = {length for length in (learned // 2, learned, 2 * learned, 4 * learned) if 0 < length <= longest}
    room = longest_prompt(model, decode)
    return sorted(lengths if room is None else {min(length, room) for length in lengths})


def check_lengths(model: Any, lengths: Sequence[int], decode: int) -> None:
    """Refuse lengths that a model has no positions for, and lengths without a token to predict.

    Raises:
        ValueError: If a length is out of range.
    """
    check_range("[2, inf)", "It counts tokens.", lengths=min(lengths))
    room = longest_prompt(model, decode)
    if room is not None and max(lengths) > room:
        raise ValueError(
            f"`lengths` must be at most {room}, got {max(lengths)}: the model has a table of {room + decode + 1} "
            f"positions, and {decode + 1} tokens are decoded. Lower it, or `decode`."
        )
