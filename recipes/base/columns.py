"""Finds the columns of a data set that hold text, chats, labels or images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)
_TEXT = (
    "text",
    "sentence",
    "content",
    "document",
    "body",
    "article",
    "review",
    "comment",
    "tweet",
    "message",
    "passage",
)
_MESSAGES = ("messages", "conversation", "conversations", "chat", "dialog", "dialogue")
_ANSWERED = (
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
)
"""Columns of prompts and their answers, by the names of trl and Alpaca."""
PARTS = ("prompt", "input", "answer")
"""What the columns of a document hold; a document has at most this many columns."""
_USUAL = {
    "text": _TEXT,
    "document": _TEXT + _MESSAGES,
    "label": ("label", "labels", "target", "class", "category", "sentiment", "topic", "intent", "emotion", "rating"),
    "image": ("image", "img", "picture", "photo"),
}
"""What a column may hold -> its usual names; the first one, spelled exactly so, is preferred to the others."""
_LONG = 40
_WORDS = {"document": "text or the messages of a chat"}
_ALSO = {"document": " (prompts and their answers as in NAME::PROMPT:ANSWER)"}


def find_columns(
    known: Sequence[str],
    features: Mapping[str, Any],
    given: Sequence[str],
    kinds: Sequence[str],
    argument: str,
    name: str,
) -> list[str]:
    """Find a column for each kind: the one that is given, or else one with a usual name.

    Args:
        known: The columns of a data set.
        features: Column -> its type in `datasets`, for the columns whose type is known.
        given: Names of columns, in the order of `kinds`; a name that is empty or missing is looked for.
        kinds: What columns hold: "text", "label", "image", or "document" (text, or the messages of a chat).
        argument: What errors call the data set.
        name: Name of the data set.

    Raises:
        ValueError: If there is no such column, if several may be meant, or if the column holds something else.
    """
    wanted = [*given, *[""] * (len(kinds) - len(given))]
    found = []
    for column, kind in zip(wanted, kinds, strict=True):
        column = column or _usual(kind, known)
        if column not in known:
            example = ":".join(_USUAL[kind][0] for kind in kinds).upper() + _ALSO.get(kind, "")
            raise ValueError(
                f"`{argument}` must name a column of {name!r}, one of {[_shortened(one) for one in known]}, got "
                f"{column!r}. Name it as in NAME::{example}, or begin the file with a line of names."
            )
        if column in features and not _holds(features[column], kind):
            raise ValueError(
                f"`{argument}` must name a column that holds one {_WORDS.get(kind, kind)} a row, got {column!r} of "
                f"{name!r}, which holds {features[column]}. Name another one of {known}."
            )
        found.append(column)
    if any(not asked and column != _USUAL[kind][0] for column, asked, kind in zip(found, wanted, kinds, strict=True)):
        log.info("These columns of %s are taken: %s.", name, ", ".join(found))
    return found


def find_document_columns(
    known: Sequence[str], features: Mapping[str, Any], given: Sequence[str], argument: str, name: str
) -> list[str]:
    """Find the column of text or chats of a data set, or the columns of prompts (one or two parts) and answers.

    Raises:
        ValueError: As `find_columns`.
    """
    pairs = [] if any(given) else _answered(known)
    alone = any(given) or _usual("document", known) in known
    taken = pairs[0] if len(pairs) == 1 and not alone else list(given)
    columns = find_columns(known, features, taken, ["document"] * max(len(taken), 1), argument, name)
    if len(columns) > 1:
        others = [column for column in known if column not in columns]
        log.info(
            "These columns of %s are taken: %s. The last one holds what is to be predicted%s.",
            name,
            ", ".join(columns),
            f"; left out: {', '.join(others)}" if others else "",
        )
    for pair in pairs if alone else []:
        log.info(
            "The column %s of %s is taken. Name %s as in %s::%s to predict answers alone.",
            columns[0],
            name,
            ", ".join(pair),
            name,
            ":".join(pair),
        )
    return columns


def _answered(known: Sequence[str]) -> list[list[str]]:
    """Find the columns of prompts and answers by their usual names; several lists if the names are ambiguous."""
    names = {column.strip().lower(): column for column in reversed(known)}
    found = [[names[column] for column in columns] for columns in _ANSWERED if names.keys() >= set(columns)]
    return [columns for columns in found if not any(set(columns) < set(other) for other in found)]


def _shortened(text: str) -> str:
    """Cut a long text off after `_LONG` characters."""
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


def _usual(kind: str, known: Sequence[str]) -> str:
    """Return the column with a usual name, in upper or lower case; the first usual name if no column can be told."""
    names = _USUAL[kind]
    if names[0] in known:
        return names[0]
    found = [column for column in known if column.strip().lower() in names]
    exact = [column for column in found if column.strip().lower() == names[0]]
    if len(found) == 1 or len(exact) == 1:
        return (exact or found)[0]
    return names[0]


def _holds(feature: Any, kind: str) -> bool:
    from datasets import ClassLabel, Image, Value

    if kind == "image":
        return isinstance(feature, Image)
    if kind == "label":
        return isinstance(feature, ClassLabel | Value)
    if kind == "document" and not isinstance(feature, Value | ClassLabel | Image):
        return True  # every row is looked at
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
