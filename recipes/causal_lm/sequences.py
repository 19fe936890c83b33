"""Makes sequences of one length from documents: joined and cut, or packed whole."""

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
    """The tokens themselves, `IGNORED` where none is to be predicted; shaped as `input_ids`."""
    position_ids: Tensor | None = None
    """Places in packed documents, from 0 on in each, shaped as `input_ids`; None: documents are joined."""

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
    """Make sequences of one length from documents, of which no more are read than needed.

    Joined documents, each followed by the end-of-text token, are cut wherever a sequence ends. Packed documents stay
    whole: a sequence holds as many as fit, then padding. Position ids begin anew in each document, so that attention
    stays inside of it. A document that is longer than a sequence is cut into parts; each part begins with the last
    token of the part before, so that every token but the document's first is predicted once, whatever the length.

    Args:
        tokenizer: A tokenizer of transformers.
        documents: Documents, in order; of chats and exchanges only the answers are to be predicted.
        length: Tokens per sequence.
        count: Number of sequences; there are fewer if the text does not suffice.
        purpose: What the text is for, in errors.
        argument: Name of the length in errors.
        pack: Pack documents instead of joining them.

    Raises:
        ValueError: If no sequence holds anything to predict.
    """
    sizes: list[int] = []
    tokens = _tokens(tokenizer, documents, sizes)
    padding = next((token for token in (tokenizer.pad_token_id, *end_of_text(tokenizer)) if token is not None), 0)
    made = _packed(tokens, length, padding) if pack else _joined(tokens, length)
    found = list(islice((row for row in made if any(label != IGNORED for label in row.labels[1:])), count))
    if not found and sum(sizes) >= length:
        raise ValueError(
            f"`text` must hold something to predict {purpose}, got {sum(sizes)} tokens without an answer. Give chats "
            f"in which the assistant answers, or raise `{argument}` if answers come late."
        )
    if not found:
        raise ValueError(
            f"`text` must hold at least {2 if pack else length} tokens {purpose}, got {sum(sizes)}. "
            f"Give more documents, or lower `{argument}`."
        )
    ids, labels, positions = (torch.tensor(column) for column in zip(*found, strict=True))
    if not pack:
        return Sequences(ids, labels)
    padded = (positions == 0) & (F.pad(positions[:, 1:], (0, 1)) == 0)  # a document has more tokens than one
    log.info("Packed %s: %d sequences, of which %.1f %% is padding.", purpose, len(ids), 100 * padded.float().mean())
    return Sequences(ids, labels, positions)


def end_of_text(tokenizer: Any) -> list[int]:
    """Return the token that ends a document, in a list; an empty list if the tokenizer has none."""
    return [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None][:1]


def _tokens(tokenizer: Any, documents: Iterable[Document], sizes: list[int]) -> Iterator[_Tokens]:
    """Yield the tokens of every document, and append their number to `sizes`."""
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
    """Join documents and cut them wherever a sequence ends; drop the rest at the end."""
    rest = _Tokens([], [], [])
    for document in documents:
        rest = _Tokens(*(one + other for one, other in zip(rest, document, strict=True)))
        whole = len(rest.ids) // length * length
        yield from (_part(rest, start, start + length) for start in range(0, whole, length))
        rest = _part(rest, whole, None)


def _packed(documents: Iterable[_Tokens], length: int, padding: int) -> Iterator[_Tokens]:
    """Put each document, or part of one, into the sequence in which it leaves the least room."""
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
    """Cut a document in parts no longer than a sequence. Each shares a token with the next; its first is unlabelled."""
    for start in range(0, len(document.ids) - 1, length - 1):
        ids, labels, positions = _part(document, start, start + length)
        yield _Tokens(ids, [IGNORED, *labels[1:]], [position - start for position in positions])


def _part(tokens: _Tokens, start: int, end: int | None) -> _Tokens:
    return _Tokens(*(column[start:end] for column in tokens))


def _room(row: list[_Tokens], length: int) -> int:
    return length - sum(len(part.ids) for part in row)


def _filled(row: list[_Tokens], length: int, padding: int) -> _Tokens:
    """Fill a sequence up. Every token of padding is a document of its own, to which nothing attends."""
    ids, labels, positions = ([value for part in row for value in part[column]] for column in range(3))
    room = length - len(ids)
    return _Tokens(ids + [padding] * room, labels + [IGNORED] * room, positions + [0] * room)
