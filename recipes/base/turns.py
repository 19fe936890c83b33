"""Documents for language models from rows: text, chats, or prompts with answers, in the shapes of trl and axolotl."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Chat = list[dict[str, Any]]
"""Messages, each with `role` and `content`; those of the role "assistant" are the answers."""
_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system", "tool")}
"""ShareGPT's `from` -> role of the chat template, as axolotl maps them by default."""
_CONTINUED = {("prompt", "completion"), ("prompt", "chosen")}
"""Columns whose texts are joined, as trl joins them; texts of other columns become turns of user and assistant."""
_SHOWN = re.compile(r"""\s*[\[{(]\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""Begin of a chat that was saved as text by Python, NumPy or JSON."""


class Exchange(NamedTuple):
    """A prompt and the answer that continues it."""

    prompt: str
    answer: str


Document = str | Chat | Exchange


def document_of(columns: Sequence[str], cells: Sequence[Any]) -> Document | None:
    """Return the document of a row; None if there is none.

    Args:
        columns: Names of the columns: one of text or chats, or those of the prompt's parts, then that of the answer.
        cells: The row's values in these columns.

    Raises:
        ValueError: If the values are anything else; the message tells what.
    """
    *asked, last = map(_read, cells)
    if last is None or not asked:
        return last
    parts = [part for part in asked if part is not None]
    if isinstance(last, str) and all(isinstance(part, str) for part in parts):
        prompt = "\n\n".join(map(str, parts))
        if tuple(column.strip().lower() for column in columns) in _CONTINUED:
            return Exchange(prompt, last)
        return [*_turn("user", prompt), *_turn("assistant", last)]
    turns = [turn for part in parts for turn in _turns("user", part)]
    answer = _turns("assistant", last)
    if answer[0]["role"] == "assistant" or not all(isinstance(part, str) for part in parts):
        return turns + answer
    # Preferences are often saved with the whole chat in the answer.
    if all(turn["content"] in [other.get("content") for other in answer] for turn in turns):
        return answer
    raise ValueError(f"a chat without its prompt {str(parts[0])[:60]!r}")


def _read(cell: Any) -> str | Chat | None:
    """Return text or the messages of a chat; None for an empty value."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    if isinstance(cell, str) and not _SHOWN.match(cell):
        return cell
    if isinstance(cell, list) and cell and all(map(_is_turn, cell)):
        return [_message(turn) for turn in cell]
    raise ValueError(f"{str(cell)[:60]!r} ({type(cell).__name__})")


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or {"from", "value"} <= value.keys())


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn with `role` and `content`; its other keys stay."""
    named = dict(turn)
    if "role" not in named:
        speaker = named.pop("from")
        if speaker not in _ROLES:
            raise ValueError(f"a turn from {speaker!r}, which is none of {', '.join(_ROLES)},")
        named = {"role": _ROLES[speaker], "content": named.pop("value"), **named}
    content = named.get("content")
    if isinstance(content, list):
        named["content"] = "".join(map(_text_of_part, content))
    elif not isinstance(content, str | None):
        raise ValueError(f"a turn that holds {str(content)[:60]!r} ({type(content).__name__})")
    return named


def _text_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"a turn with {str(part)[:60]!r}, which is not text,")


def _turns(role: str, said: str | Chat) -> Chat:
    return said if isinstance(said, list) else _turn(role, said)


def _turn(role: str, text: str) -> Chat:
    return [{"role": role, "content": text}]
