"""Documents to train on: text files and the rows of data sets, with some of them held out."""

from __future__ import annotations

import glob
import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from sparse_prune.recipes.base.loader import SPLITS
from sparse_prune.recipes.base.plain_text import read_text
from sparse_prune.recipes.base.rows import Rows, document_rows, is_data_set
from sparse_prune.recipes.base.sources import files_in, stdlib_documents
from sparse_prune.recipes.base.tables import is_table
from sparse_prune.recipes.base.turns import Document

log = logging.getLogger(__name__)
STDLIB = "stdlib"
_FEW = 32  # rows that are held before any is handed on
_BREAKS = ("\n\n", "\n", " ")


def split_text(text: str | list[str], held_out_share: float = 0.1, seed: int = 0) -> Mapping[str, Iterable[Document]]:
    """Split documents into "train", "val" and "test"; a document stays in its split when others are added.

    Args:
        text: As for `TextDataModule`. Every pass over a split reads a data set anew, as far as documents are taken.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents in files; the rows of a data set keep their own.
    """
    tables, files = _kinds(text)
    found = [_split_rows(rows, held_out_share) for rows in (document_rows(name, "text") for name in tables)]
    if files or not tables:
        found.append(split_documents(load_documents(files), held_out_share, seed))
    return {split: chain.from_iterable([splits[split] for splits in found]) for split in SPLITS}


def all_documents(text: str | list[str]) -> Iterable[Document]:
    """Return the documents of all splits; `text` is as in `split_text`."""
    tables, files = _kinds(text)
    rows = (document for name in tables for _, document in document_rows(name, "text").documents())
    return chain(rows, load_documents(files).values()) if files or not tables else rows


def split_documents(
    documents: Mapping[str, Document], held_out_share: float = 0.1, seed: int = 0
) -> Mapping[str, list[Document]]:
    """Shuffle and split documents into "train", "val" and "test"; one stays in its split when others are added.

    If there are too few documents for all splits, each one is split, with a log line: its first part is for training,
    the next one for validation, its end for the test.
    """
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    return _split([(name, documents[name]) for name in names], held_out_share)


def load_documents(text: str | list[str]) -> dict[str, str]:
    """Load documents from "stdlib", files, folders or globs, without blank ones: name -> document.

    The name of a file is its absolute path.

    Raises:
        ValueError: If nothing is found, or a file is not text.
    """
    documents: dict[str, str] = {}
    for entry in [text] if isinstance(text, str) else text:
        if entry == STDLIB:
            documents |= stdlib_documents()
        else:
            documents |= {str(file.resolve()): read_text(file, "text") for file in _files(entry)}
    written = {name: document for name, document in documents.items() if document.strip()}
    if not written:
        matched = "none but blank ones" if documents else "none"
        raise ValueError(
            f"`text` must name files that hold text, got {text!r}, which matches {matched}. "
            "Give files, folders, globs, tables, 'stdlib' or 'hub:NAME'."
        )
    return written


def _kinds(text: str | list[str]) -> tuple[list[str], list[str]]:
    """Split the entries into data sets and files."""
    entries = [text] if isinstance(text, str) else text
    tables = [entry for entry in entries if entry != STDLIB and is_data_set(entry)]
    return tables, [entry for entry in entries if entry not in tables]


def _split_rows(rows: Rows, held_out_share: float) -> Mapping[str, Iterable[Document]]:
    first = list(islice(rows.documents(), _FEW))
    if len(first) < _FEW:
        return _split([(str(row), document) for row, document in first], held_out_share)
    return {split: _rows_of(split, rows, held_out_share) for split in SPLITS}


def _rows_of(split: str, rows: Rows, held_out_share: float) -> Iterator[Document]:
    for row, document in rows.documents():
        if _split_of(str(row), held_out_share) == split:
            yield document


def _split(documents: Sequence[tuple[str, Document]], held_out_share: float) -> Mapping[str, list[Document]]:
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name, document in documents:
        splits[_split_of(name, held_out_share)].append(document)
    whole = [document for _, document in documents if isinstance(document, str)]
    if all(splits.values()) or len(whole) < len(documents):
        return splits
    log.info(
        "There are too few documents (%d) to hold out whole ones: the last %.0f %% of each are for the test, as much "
        "before that for validation.",
        len(whole),
        100 * held_out_share,
    )
    parts = [_parts(document, held_out_share) for document in whole]
    return {split: [part[split] for part in parts if part[split].strip()] for split in SPLITS}


def _parts(document: str, held_out_share: float) -> dict[str, str]:
    """Cut a document into its parts for the splits, each up to the end of a paragraph, a line or a word."""
    room = int(held_out_share * len(document) / 2)
    ends = (1 - 2 * held_out_share, 1 - held_out_share)
    val, test = (_break_behind(document, int(end * len(document)), room) for end in ends)
    return {"train": document[:val], "val": document[val:test], "test": document[test:]}


def _break_behind(document: str, place: int, room: int) -> int:
    """Find the end of a passage at most `room` characters after a place; the place itself if there is none."""
    found = (document.find(mark, place, place + room) + len(mark) for mark in _BREAKS)
    return next((end for end in found if end > place), place)


def _split_of(name: str, held_out_share: float) -> str:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "val" if place < held_out_share else "test" if place < 2 * held_out_share else "train"


def _files(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    if not path.is_dir():
        return [Path(found) for found in sorted(glob.glob(str(path), recursive=True)) if Path(found).is_file()]
    files = files_in(path)
    tables = [file for file in files if is_table(file)]
    if tables:
        log.info(
            "Tables among the text files are read as text, %d in %s; name them by themselves to read their rows.",
            len(tables),
            path,
        )
    return files
