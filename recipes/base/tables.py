"""Loads tables of this machine as data sets: CSV, JSON, Parquet, Arrow, and folders of `save_to_disk`."""

from __future__ import annotations

import glob
import gzip
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_prune.recipes.base.plain_text import GZIP, conversion, encoding_of
from sparse_prune.recipes.base.sources import files_in
from sparse_prune.words import some

_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
SUFFIXES = ", ".join(_READERS)
_SEPARATORS = ",;\t|"
_ABOUT = {".md", ".py", "dataset_infos.json", "dataset_info.json"}  # suffixes and names of files beside tables
_SAVED = ("dataset_info.json", "dataset_dict.json")
_HEAD = 1 << 16  # bytes that hold the names of columns


def files_at(place: str) -> list[Path]:
    """Return the file or folder of a path, or the matches of a glob; empty without any."""
    path = Path(place).expanduser()
    return [path] if path.exists() else [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]


def is_table(file: Path) -> bool:
    """Whether a file is a table, by its name."""
    return _reader(file) is not None


def is_saved(place: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any((place / name).is_file() for name in _SAVED) and any(place.rglob("*.arrow"))


def holds_tables(place: str) -> bool:
    """Whether files, a folder or a glob are tables and nothing else."""
    files = _data_files(place)
    return is_saved(Path(place).expanduser()) or (bool(files) and all(map(is_table, files)))


def load_tables(place: str, argument: str, stream: bool) -> Any:
    """Load the rows of files of one kind, or the training split of a folder that `save_to_disk` wrote.

    Cells of CSV stay text; the separator is the most frequent of comma, semicolon, tab and bar in the first line.

    Args:
        place: A file, a glob, or a folder that `save_to_disk` wrote.
        argument: Its name in errors.
        stream: Read rows on request.

    Raises:
        ValueError: If a file cannot be read; the message names it.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(place).expanduser()
    if path.is_dir():
        saved = load_from_disk(str(path))
        if not isinstance(saved, DatasetDict):
            return saved
        if "train" not in saved:
            raise ValueError(
                f"`{argument}` must have a split called train, got {sorted(saved)} in {place!r}. Rename one."
            )
        return saved["train"]
    files = files_at(place)
    reader = _common_reader(files)
    if reader is None:
        raise ValueError(f"`{argument}` must be tables of one kind ({SUFFIXES}), got {place!r}. Name one kind.")
    with readable(place, argument):
        options = options_for(place)
        return load_dataset(reader, data_files=list(map(str, files)), split="train", streaming=stream, **options)


def options_for(place: str) -> dict[str, Any]:
    """Return the options of `load_dataset` for CSV and JSON: encoding, separator, and that cells are text.

    Args:
        place: Files, a folder or a glob; the first file, or the first of the training split, decides for all. There
            are no options unless all are tables of one kind.

    Raises:
        ValueError: If the first row of CSV cannot be read, or a file of JSON begins with neither an object nor a list.
    """
    files = _data_files(place)
    reader = _common_reader(files)
    if reader not in ("csv", "json"):
        return {}
    file = next((file for file in files if "train" in file.name), files[0])
    head = _head(file)
    options: dict[str, Any] = {"encoding": encoding_of(head)}
    if reader == "json":
        _check_json(files)
    else:
        first_line = head.decode(options["encoding"], errors="ignore").partition("\n")[0]
        options |= {"sep": max(_SEPARATORS, key=first_line.count), "index_col": False, "keep_default_na": False}
        options["features"] = _text_columns(file, options)
    return options


def _head(file: Path) -> bytes:
    """Read the first bytes of a file, compressed by gzip or not."""
    with open(file, "rb") as opened:
        start = opened.read(len(GZIP))
    with gzip.open(file) if start == GZIP else open(file, "rb") as opened:
        return opened.read(_HEAD)


def _check_json(files: Sequence[Path]) -> None:
    """Refuse files that begin neither object nor list: on some of them the reader of `datasets` ends the process."""
    for file in files:
        head = _head(file)
        start = head.decode(encoding_of(head), errors="ignore").lstrip()[:1]
        if start not in ("{", "["):
            raise ValueError(f"{file.name} begins with {start!r}" if start else f"{file.name} is empty")


@contextmanager
def readable(place: str, argument: str) -> Iterator[None]:
    """Turn errors of a library that reads files into a refusal that names them."""
    from datasets.exceptions import DatasetGenerationError

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # its errors are raised as well
    try:
        yield
    except ConnectionError:
        raise
    except (DatasetGenerationError, OSError, TypeError, ValueError) as error:
        raise unreadable(error, place, argument) from error


def unreadable(error: Exception, place: str, argument: str) -> ValueError:
    """Make the error for tables that a library failed to read."""
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    files = [str(file) for file in files_at(place)] or [place]
    remedy = "Copy it again"
    if _reader(Path(files[0])) in ("csv", "json"):
        remedy = "Mend the file: cells that hold the separator stand in quotes, JSON holds an object a line or a list"
    if isinstance(cause, UnicodeDecodeError):
        remedy = conversion(Path(files[0]))
    told = str(cause).strip().rstrip(".")
    return ValueError(
        f"`{argument}` must be a table that can be read, got {some(list(map(repr, files)))}: {told}. {remedy}."
    )


def _data_files(place: str) -> list[Path]:
    """List the data files of a path or a glob."""
    path = Path(place).expanduser()
    files = files_in(path, tell=False) if path.is_dir() else files_at(place)
    return [file for file in files if not _ABOUT & {file.suffix.lower(), file.name}]


def _common_reader(files: Sequence[Path]) -> str | None:
    """Find the reader of `datasets` for all of these files; None if there are several or none."""
    readers = {_reader(file) for file in files}
    return readers.pop() if len(readers) == 1 else None


def _reader(file: Path) -> str | None:
    return _READERS.get(Path(file.name.lower().removesuffix(".gz")).suffix)


def _text_columns(file: Path, options: dict[str, Any]) -> Any:
    import pandas
    from datasets import Features, Value

    with warnings.catch_warnings():
        # For later rows pandas raises an error itself if they are too long.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            columns = pandas.read_csv(file, nrows=1, **options).columns
        except pandas.errors.ParserWarning as error:
            raise ValueError("Row 1 has more cells than there are columns") from error
    return Features({str(column): Value("string") for column in columns})
