"""Reads what W&B's client keeps on disk: records of protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_HEADER = 7
"""Bytes before a file's first record (":W&B", a magic number, a version), and before every piece: crc, length, type."""
_WHOLE, _LAST = 1, 4

Rows = list[tuple[int, dict[str, float]]]


def read_offline(path: Path) -> tuple[Rows, dict[str, str]]:
    """Read numbers and settings from a run-*.wandb file, as far as it was written.

    Format: https://github.com/google/leveldb/blob/main/doc/log_format.md, wandb/proto/wandb_internal.proto.

    Returns:
        Rows (step as logged, key -> number) in order, and the run's config, flat, as text.

    Raises:
        ImportError: If wandb is missing.
        ValueError: If the file is not one of W&B's client.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    if not data.startswith(b":W&B"):
        raise ValueError(f"{path} must be a file of W&B's client, got one that begins with {data[:4]!r}. Remove it.")
    rows: Rows = []
    settings: dict[str, str] = {}
    last = 0
    for piece in _records(data):
        record = Record.FromString(piece)
        for item in (*record.run.config.update, *record.config.update):
            value = json.loads(item.value_json)
            settings["/".join(item.nested_key) or item.key] = value if isinstance(value, str) else json.dumps(value)
        row = _numbers(record.history.item)
        last = int(row.pop("trainer/global_step", last))
        # W&B repeats every row in its summary; how the run ended stands there alone.
        end = {key: value for key, value in _numbers(record.summary.update).items() if key.startswith("final/")}
        rows.append((last, row | end))
    return rows, settings


def _numbers(items: Iterable[Any]) -> dict[str, float]:
    """Return the numbers of a record, without those of the client itself, which begin with "_"."""
    found = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and not k.startswith("_")}


def _records(data: bytes) -> Iterator[bytes]:
    """Yield whole records, without one that the end of the file cuts off."""
    place, parts = _HEADER, b""
    while place + _HEADER <= len(data):
        room = _BLOCK - place % _BLOCK
        if room < _HEADER:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (_WHOLE, _LAST) and place <= len(data):
            yield parts
            parts = b""
