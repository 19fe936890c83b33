"""What rows hold for a language model: text, chats, or prompts and their answers, in the shapes of trl and axolotl."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Chat = list[dict[str, Any]]
"""Messages, each with `role` and `content`; "assistant" gives the answers."""
_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("user", "assistant", "system", "tool")}
"""Who speaks in ShareGPT's `from` -> the role in a chat template, by axolotl's default."""
_CONTINUED = {("prompt", "completion"), ("prompt", "chosen")}
"""Columns whose text goes on from one to the other, as trl has it; text of others is what user and assistant say."""
_SHOWN = re.compile(r"""\s*[\[{(]\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""How a chat begins that somebody has saved as text, by Python, NumPy or JSON."""


class Exchange(NamedTuple):
    """An answer, and the text that it goes on from."""

    prompt: str
    answer: str


Document = str | Chat | Exchange


def document_of(columns: Sequence[str], cells: Sequence[Any]) -> Document | None:
    """The document of a row; None if it holds none.

    Args:
        columns: Their names: one that holds text or chats, or those of a prompt, in parts, and last of its answer.
        cells: What the row has in them.

    Raises:
        ValueError: If they hold anything else; the message says what.
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
    # The whole chat once more, as preferences are often saved.
    if all(turn["content"] in [other.get("content") for other in answer] for turn in turns):
        return answer
    raise ValueError(f"a chat without its prompt {str(parts[0])[:60]!r}")


def _read(cell: Any) -> str | Chat | None:
    """Text or the messages of a chat; None if there is neither."""
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
    """A turn with `role` and `content`, whatever else it holds."""
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
    raise ValueError(f"a turn with {str(part)[:60]!r}, which is no text,")


def _turns(role: str, said: str | Chat) -> Chat:
    return said if isinstance(said, list) else _turn(role, said)


def _turn(role: str, text: str) -> Chat:
    return [{"role": role, "content": text}]
