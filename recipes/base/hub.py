"""Data sets of the hub, and folders that hold files like theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_prune.recipes.base.classification import in_order

PREFIX = "hub:"


def hub_rows(name: str, kinds: Sequence[str], argument: str, stream: bool = False) -> tuple[Any, list[str]]:
    """The training split of a data set, and the names of its columns.

    Args:
        name: `hub:NAME[:CONFIG[:COLUMN...]]`. NAME is an id of the hub or a folder of Parquet, JSON or other files that
            `datasets.load_dataset` takes; a folder's name may hold colons.
        kinds: What each column holds, "text", "image" or "label"; also what it is called where `name` does not say.
        argument: What errors call the name.
        stream: Read rows as they are asked for, rather than download all of them first.

    Raises:
        ConnectionError: If the hub cannot be reached.
        FileNotFoundError: If there is no such data set.
        ValueError: If the data set is a script, has no such configuration, no training split or no such column, or a
            column holds something else.
    """
    data_set, config, columns = _parse(name, kinds, argument)
    rows = _load(data_set, config, argument, stream)
    features = rows.features or {}  # streamed JSON and CSV do not say
    known = rows.column_names or list(next(iter(rows), {}))
    for column, kind in zip(columns, kinds, strict=True):
        if column not in known:
            raise ValueError(
                f"`{argument}` must name a column of {data_set!r}, one of {known}, got {column!r}. "
                f"Name it: {PREFIX}NAME:CONFIG:{':'.join(kinds).upper()}; CONFIG may be empty."
            )
        if column in features and not _holds(features[column], kind):
            raise ValueError(
                f"`{argument}` must name a column that holds one {kind} a row, got {column!r} of {data_set!r}, which "
                f"holds {features[column]}. Name another one of {known}."
            )
    return rows, columns


def hub_classes(rows: Any, column: str, argument: str) -> tuple[list[str], list[int]]:
    """Names of the classes in the order of their numbers, and every row's number. Reads no other column.

    A column of classes (`datasets.ClassLabel`) says itself how they are called; classes that no row has keep their
    numbers. Other labels are numbered as `in_order` has them.

    Args:
        rows: A data set that is not streamed.
        column: Its labels.
        argument: What errors call the data set.

    Raises:
        ValueError: If a row has no label; in a column of classes, -1 stands for none.
    """
    labels = list(rows[column])
    named: list[str] | None = getattr(rows.features[column], "names", None)
    missing = [
        index for index, label in enumerate(labels) if label is None or (label < 0 if named else not str(label).strip())
    ]
    if missing:
        raise ValueError(
            f"`{argument}` must have a label in every row, got none{' (-1)' if named else ''} in {len(missing)} of "
            f"{len(labels)} rows of column {column!r}, the first of them row {missing[0] + 1}. Name another column, or "
            f"save the rows with labels as Parquet and give {PREFIX}FOLDER."
        )
    if named:
        return list(named), labels
    classes = in_order({str(label) for label in labels})
    numbers = {label: number for number, label in enumerate(classes)}
    return classes, [numbers[str(label)] for label in labels]


def _parse(name: str, kinds: Sequence[str], argument: str) -> tuple[str, str | None, list[str]]:
    """Data set, configuration and columns."""
    parts = name.removeprefix(PREFIX).split(":")
    # As many parts as name a folder; ids of the hub hold no colons.
    end = next((end for end in range(len(parts), 0, -1) if Path(":".join(parts[:end])).is_dir()), 1)
    data_set, config, columns = ":".join(parts[:end]), parts[end : end + 1], parts[end + 1 :]
    if not data_set or len(columns) > len(kinds):
        raise ValueError(
            f"`{argument}` must be {PREFIX}NAME[:CONFIG[:COLUMN...]] with at most {len(kinds)} columns "
            f"({', '.join(kinds)}), got {name!r}. Leave out what is too much."
        )
    given = columns + [""] * (len(kinds) - len(columns))
    return data_set, "".join(config) or None, [column or kind for column, kind in zip(given, kinds, strict=True)]


def _load(data_set: str, config: str | None, argument: str, stream: bool) -> Any:
    from datasets import load_dataset

    wanted = f"`{argument}` must name a data set of the hub, or a folder of files, with a split called train, got "
    wanted += repr(data_set if config is None else f"{data_set}:{config}")
    try:
        return load_dataset(data_set, config, split="train", streaming=stream)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{wanted}, which does not exist, holds no data, or needs an account ({error}). Check the name; log in "
            "with `hf auth login` where it is private or gated."
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
    except ValueError as error:
        raise ValueError(
            f"{wanted}, which does not load ({error}). Name a configuration of it ({PREFIX}NAME:CONFIG), or another "
            "data set."
        ) from error


def _holds(feature: Any, kind: str) -> bool:
    from datasets import ClassLabel, Image, Value

    if kind == "image":
        return isinstance(feature, Image)
    if kind == "label":
        return isinstance(feature, ClassLabel | Value)
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
