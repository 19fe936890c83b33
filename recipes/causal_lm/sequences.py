"""Documents as sequences of one length: joined and cut, or packed whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from typing_extensions import override

from sparse_prune.recipes.base.turns import Document, Exchange
from sparse_prune.recipes.causal_lm.chats import IGNORED, chat_tokens, exchange_tokens

log = logging.getLogger(__name__)
_OPEN = 32  # packed sequences that wait for more


class _Tokens(NamedTuple):
    """A document, a part of one, or a sequence."""

    ids: list[int]
    labels: list[int]
    """The tokens themselves, `IGNORED` where none is to be predicted."""
    positions: list[int]
    """Places in the documents."""


@dataclass(frozen=True)
class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of one length, as a model takes them."""

    input_ids: Tensor
    """int64, (sequences, length)."""
    labels: Tensor
    """The tokens themselves, `IGNORED` where none is to be predicted; like `input_ids`."""
    position_ids: Tensor | None = None
    """Places in the documents, from 0 on in each, where they are packed; like `input_ids`."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in vars(self).items() if values is not None}


def make_sequences(
    tokenizer: Any,
    documents: Iterable[Document],
    length: int,
    count: int,
    purpose: str,
    argument: str,
    pack: bool = False,
) -> Sequences:
    """Documents as sequences of one length; only as many are read as are needed.

    Joined documents, with the end-of-text token behind each, are cut wherever a sequence ends. Packed ones stay whole:
    a sequence holds as many as have room, then padding, and position ids begin anew in each, by which attention stays
    inside. The rest of a document that is longer than a sequence begins with the last token of what stands before, so
    that every token of a document but the first is predicted once, whatever the length.

    Args:
        tokenizer: Of transformers.
        documents: In their order; of chats and exchanges only the answers are to be predicted.
        length: Tokens per sequence.
        count: Sequences; fewer if there is not so much text.
        purpose: What errors say that the text is for.
        argument: What errors call the length.
        pack: Pack documents rather than join them.

    Raises:
        ValueError: If there is not one sequence in which something is to be predicted.
    """
    sizes: list[int] = []
    tokens = _tokens(tokenizer, documents, sizes)
    made = _packed(tokens, length, _padding(tokenizer)) if pack else _joined(tokens, length)
    found = list(islice((row for row in made if any(label != IGNORED for label in row.labels[1:])), count))
    if not found and sum(sizes) >= length:
        raise ValueError(
            f"`text` must hold something to predict {purpose}, got {sum(sizes)} tokens without an answer. Give chats "
            f"in which the assistant answers, or raise `{argument}` where answers come late."
        )
    if not found:
        raise ValueError(
            f"`text` must hold at least {2 if pack else length} tokens {purpose}, got {sum(sizes)}. "
            f"Give more documents, or lower `{argument}`."
        )
    ids, labels, positions = (torch.tensor(column) for column in zip(*found, strict=True))
    if not pack:
        return Sequences(ids, labels)
    padding = (positions == 0) & (F.pad(positions[:, 1:], (0, 1)) == 0)  # a document has more tokens than one
    log.info("Packed %s: %d sequences, of which %.1f %% is padding.", purpose, len(ids), 100 * padding.float().mean())
    return Sequences(ids, labels, positions)


def end_of_text(tokenizer: Any) -> list[int]:
    """The token that stands behind a document, one or none."""
    return [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None][:1]


def _tokens(tokenizer: Any, documents: Iterable[Document], sizes: list[int]) -> Iterator[_Tokens]:
    """The tokens of every document, whose numbers are put down."""
    end = end_of_text(tokenizer)
    for document in documents:
        if isinstance(document, str):
            ids = [*tokenizer(document, verbose=False)["input_ids"], *end]
            labels = ids
        elif isinstance(document, Exchange):
            ids, labels = exchange_tokens(tokenizer, document, end)
        else:
            ids, labels = chat_tokens(tokenizer, document)
        sizes.append(len(ids))
        yield _Tokens(ids, labels, list(range(len(ids))))


def _joined(documents: Iterable[_Tokens], length: int) -> Iterator[_Tokens]:
    """One document after the other, cut wherever a sequence ends; what is left at the end is dropped."""
    rest = _Tokens([], [], [])
    for document in documents:
        rest = _Tokens(*(one + other for one, other in zip(rest, document, strict=True)))
        whole = len(rest.ids) // length * length
        yield from (_part(rest, start, start + length) for start in range(0, whole, length))
        rest = _part(rest, whole, None)


def _packed(documents: Iterable[_Tokens], length: int, padding: int) -> Iterator[_Tokens]:
    """Each document, or part of one, where the least room is left behind it."""
    waiting: list[list[_Tokens]] = []
    for document in documents:
        for part in _parts(document, length):
            fitting = [row for row in waiting if _room(row, length) >= len(part.ids)]
            chosen: list[_Tokens] = min(fitting, key=lambda row: _room(row, length), default=[])
            if not chosen:
                waiting.append(chosen)
            chosen.append(part)
            if not _room(chosen, length) or len(waiting) > _OPEN:
                fullest = min(waiting, key=lambda row: _room(row, length))
                waiting = [row for row in waiting if row is not fullest]
                yield _filled(fullest, length, padding)
    yield from (_filled(row, length, padding) for row in waiting)


def _parts(document: _Tokens, length: int) -> Iterator[_Tokens]:
    """A document as parts no longer than a sequence. Each shares a token with the next; its first does not count."""
    for start in range(0, len(document.ids) - 1, length - 1):
        ids, labels, positions = _part(document, start, start + length)
        yield _Tokens(ids, [IGNORED, *labels[1:]], [position - start for position in positions])


def _part(tokens: _Tokens, start: int, end: int | None) -> _Tokens:
    return _Tokens(*(column[start:end] for column in tokens))


def _room(row: list[_Tokens], length: int) -> int:
    return length - sum(len(part.ids) for part in row)


def _filled(row: list[_Tokens], length: int, padding: int) -> _Tokens:
    """A whole sequence. Every token of padding is a document of its own, which nothing attends to."""
    ids, labels, positions = ([value for part in row for value in part[column]] for column in range(3))
    room = length - len(ids)
    return _Tokens(ids + [padding] * room, labels + [IGNORED] * room, positions + [0] * room)


def _padding(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, *end_of_text(tokenizer)) if token is not None), 0)
