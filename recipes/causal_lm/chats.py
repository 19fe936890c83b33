"""Converts chats and exchanges to tokens, with labels for the answers, which are to be predicted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparse_prune.recipes.base.turns import Exchange

IGNORED = -100
"""The label of a token that does not count in the loss, as in transformers."""
_STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}"
Messages = Sequence[Mapping[str, Any]]


def chat_tokens(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat by the tokenizer's template, and labels: tokens of answers, `IGNORED` elsewhere.

    An answer is the text that changes in the whole chat when another answer takes its place, with the special token
    that ends it. So templates need no marks, and may show earlier turns in another way than the last one.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        messages: Messages with `role` and `content`. Those of the assistant are answers, unless their `weight` is 0.

    Raises:
        ValueError: If there is no template, or it refuses the messages.
    """
    if not tokenizer.is_fast or not tokenizer.chat_template:
        raise ValueError(
            "`text` must be plain text for a tokenizer that is slow or has no chat template, got chats. Take an "
            "instruction-tuned model, or save its tokenizer with a `chat_template`."
        )
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in messages]
    chat = _rendered(tokenizer, turns)
    ids, inside = _places(tokenizer, chat, list(_answers(tokenizer, turns, chat)), add_special_tokens=False)
    labels = [IGNORED] * len(ids)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for answer in inside:
        following = answer[-1] + 1 if answer else len(ids)
        if following < len(ids) and ids[following] in special:
            answer.append(following)
        for index in answer:
            labels[index] = ids[index]
    return ids, labels


def exchange_tokens(tokenizer: Any, exchange: Exchange, end: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and answer, and labels: tokens of the answer and its end, `IGNORED` for the prompt.

    A token with characters of both belongs to the answer.

    Args:
        tokenizer: A fast tokenizer of transformers.
        exchange: The prompt and the answer.
        end: Tokens after the answer.

    Raises:
        ValueError: If the tokenizer is slow.
    """
    if not tokenizer.is_fast:
        raise ValueError("`text` must be plain text for a slow tokenizer, got prompts and answers. Take a fast one.")
    start, text = len(exchange.prompt), exchange.prompt + exchange.answer
    ids, (inside,) = _places(tokenizer, text, [(start, len(text))], add_special_tokens=True)
    answer = set(inside)
    labels = [token if index in answer else IGNORED for index, token in enumerate(ids)]
    return [*ids, *end], [*labels, *end]


def _places(
    tokenizer: Any, text: str, passages: Sequence[tuple[int, int]], add_special_tokens: bool
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a text, and for each passage (start and end in the text) the places of its tokens."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    inside = [
        [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
        for start, end in passages
    ]
    return list(encoded["input_ids"]), inside


def _answers(tokenizer: Any, turns: list[dict[str, Any]], chat: str) -> Iterator[tuple[int, int]]:
    """Find where answers begin and end in the text of a chat."""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn.get("weight", 1):  # OpenAI's files say so of what is not to be learnt
            other = _rendered(tokenizer, [*turns[:index], turn | {"content": _STAND_IN}, *turns[index + 1 :]])
            start = len(os.path.commonprefix([chat, other]))
            end = len(os.path.commonprefix([chat[start:][::-1], other[start:][::-1]]))
            yield start, len(chat) - end


def _rendered(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"`text` must hold chats that the tokenizer's template takes, got one that begins with "
            f"{str(turns[0])[:80]}: {error}. Bring its turns into the order and the roles that the model knows."
        ) from error
