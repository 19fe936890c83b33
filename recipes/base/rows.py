"""Reads the rows of data sets, from the hub or from this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_prune.recipes.base.columns import PARTS, find_columns, find_document_columns
from sparse_prune.recipes.base.labels import numbered
from sparse_prune.recipes.base.tables import (
    files_at,
    holds_tables,
    is_saved,
    load_tables,
    options_for,
    readable,
    unreadable,
)
from sparse_prune.recipes.base.turns import Document, document_of

log = logging.getLogger(__name__)
PREFIX = "hub:"


@dataclass(frozen=True)
class Rows:
    """The training split of a data set, with the columns that were asked for."""

    data: Any
    """A data set of the `datasets` library, streamed or not."""
    columns: list[str]
    """Names of the columns, in the order in which they were asked for."""
    name: str
    """Name of the data set."""
    argument: str
    """What errors call the data set."""
    parts: int = 1
    """Number of columns that make up a document (`document_of`), counted from the first."""
    _told: set[str] = field(default_factory=set)

    def documents(self) -> Iterator[tuple[int, Document]]:
        """Yield the number and the document of every row; rows without a document are left out, with one log line.

        Raises:
            ValueError: If a row cannot be read, or holds anything but text, a chat, or a prompt and its answer.
        """
        columns = self.columns[: self.parts]
        for row, cells in enumerate(self._cells(columns), 1):
            try:
                document = document_of(columns, cells)
            except ValueError as error:
                raise ValueError(
                    f"`{self.argument}` must hold text, or messages with `role` and `content`, got {error} in row "
                    f"{row} of {self.name!r}. Save chats as JSON lines or Parquet, not as text; name other columns "
                    "if it is neither."
                ) from error
            if document is None:
                self._tell_once(f"Rows without text are left out of {self.name}; the first of them is row {row}.")
            else:
                yield row - 1, document

    def classes(self) -> tuple[list[str], list[int]]:
        """Return the names of the classes and every row's class number, from the second column alone.

        A column of type `datasets.ClassLabel` holds the names itself. The rows must not be streamed. Errors are those
        of `numbered`.
        """
        column = self.columns[1]
        return numbered(list(self.data[column]), self.argument, getattr(self.data.features[column], "names", None))

    def _cells(self, columns: list[str]) -> Iterator[list[Any]]:
        with readable(self.name, self.argument):
            for row in self.data.select_columns(columns):
                yield [row[column] for column in columns]

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.info(text)


def is_data_set(name: str) -> bool:
    """Whether a name means rows: it begins with `hub:`, or tables lie at the path."""
    return name.startswith(PREFIX) or holds_tables(_place(name)[0])


def data_rows(name: str, kinds: Sequence[str], argument: str, stream: bool = False) -> Rows:
    """Open the training split of a data set, with a column of each kind.

    Args:
        name: `NAME[:CONFIG[:COLUMN...]]`. NAME is a table (tables.py), a glob of tables of one kind, or a folder of
            them; after `hub:` it may also be an id of the hub, or any folder that `datasets.load_dataset` takes. Paths
            may hold colons.
        kinds: What each column holds, as `find_columns` takes it.
        argument: What errors call the name.
        stream: Read rows on request instead of all rows first.

    Raises:
        ConnectionError: If the hub cannot be reached.
        FileNotFoundError: If there is no such data set.
        ValueError: If the data set is a script, cannot be read, has no such configuration, no training split or no
            such column, or a column holds something else.
    """
    place, columns, data, known = _opened(name, kinds, argument, stream)
    return Rows(data, find_columns(known, data.features or {}, columns, kinds, argument, place), place, argument)


def document_rows(name: str, argument: str) -> Rows:
    """Open the training split of a data set for a language model, streamed: text, chats, or prompts and their answers.

    Args:
        name: As in `data_rows`; it may name the columns of prompts and answers, as in `find_document_columns`.
        argument: What errors call the name.

    Raises:
        ConnectionError: As in `data_rows`, which also lists the other errors.
    """
    place, given, data, known = _opened(name, PARTS, argument, stream=True)
    columns = find_document_columns(known, data.features or {}, given, argument, place)
    return Rows(data, columns, place, argument, parts=len(columns))


def _opened(name: str, parts: Sequence[str], argument: str, stream: bool) -> tuple[str, list[str], Any, list[str]]:
    """Open a data set: its place, the columns that `name` names (one a part at most), the data, all column names."""
    place, rest = _place(name)
    config, columns = "".join(rest[:1]) or None, rest[1:]
    if not place or len(columns) > len(parts):
        raise ValueError(
            f"`{argument}` must be {PREFIX}NAME[:CONFIG[:COLUMN...]] with at most {len(parts)} columns "
            f"({', '.join(parts)}), got {name!r}. Leave the others out."
        )
    path = Path(place).expanduser()
    if is_saved(path) or (files_at(place) and not path.is_dir()):
        data = load_tables(place, argument, stream)
    else:
        data = _load(str(path) if path.is_dir() else place, config, argument, stream)
    with readable(place, argument):
        return place, columns, data, data.column_names or list(next(iter(data), {}))  # streams may not say


def place_of(name: str) -> str:
    """Strip configuration and columns from a name, and `hub:` from a place on this machine."""
    place = _place(name)[0]
    return place if files_at(place) or not name.startswith(PREFIX) else PREFIX + place


def _place(name: str) -> tuple[str, list[str]]:
    """Split a name into its place and its other parts: the longest path that exists, or else an id without colons."""
    parts = name.removeprefix(PREFIX).split(":")
    end = next((end for end in range(len(parts), 0, -1) if files_at(":".join(parts[:end]))), 1)
    return ":".join(parts[:end]), parts[end:]


def _load(data_set: str, config: str | None, argument: str, stream: bool) -> Any:
    """Load a data set of the hub, or a folder by the layout of its files."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    wanted = f"`{argument}` must name a data set of the hub, or a folder of files, with a split called train, got "
    wanted += repr(data_set if config is None else f"{data_set}:{config}")
    with readable(data_set, argument):
        options = options_for(data_set)
    try:
        return load_dataset(data_set, config, split="train", streaming=stream, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{wanted}, which does not exist, holds no data, or needs an account ({error}). Check the name; log in "
            "with `hf auth login` if it is private or gated."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{wanted}, but the hub cannot be reached ({error}). Connect, or copy the data set's files into a folder "
            f"and give {PREFIX}FOLDER."
        ) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{wanted}, which is a loading script ({error}). Name a copy in Parquet, or write one with `datasets` 3 "
            f"(`to_parquet`) and give {PREFIX}FOLDER."
        ) from error
    except DatasetGenerationError as error:
        raise unreadable(error, data_set, argument) from error
    except ValueError as error:
        raise ValueError(
            f"{wanted}, which does not load ({error}). Name a configuration of it ({PREFIX}NAME:CONFIG), or another "
            "data set."
        ) from error
