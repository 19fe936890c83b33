"""The heads that kvpress' DuoAttentionPress masks, as a file."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_prune.export.formats.format import Format
from sparse_prune.export.heads import Reach, StreamingHeads
from sparse_prune.files import whole_file

_FILE = "kvpress.json"


class KVPress(Format):
    """`kvpress.json`: `sink_size`, `recent_size` and `streaming_mask`, as `DuoAttentionPress` holds them.

    The mask has a row per layer and a column per KV head, 1 = sinks and a window. kvpress masks keys for what comes
    after the prompt, and computes the prompt itself densely; docs/serving.md shows how a press takes the file.
    Source: https://github.com/NVIDIA/kvpress, `kvpress/presses/duo_attention_press.py`.
    """

    def _write(self, heads: StreamingHeads, folder: Path) -> None:
        held = {
            "sink_size": heads.reach.sink,
            "recent_size": heads.reach.recent,
            "streaming_mask": [[int(not full) for full in row] for row in heads.full],
        }
        with whole_file(folder / _FILE) as path:
            path.write_text(json.dumps(held) + "\n", encoding="utf-8")

    def _read(self, folder: Path) -> StreamingHeads:
        held = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        full = tuple(tuple(not streaming for streaming in row) for row in held["streaming_mask"])
        return StreamingHeads(full, Reach(int(held["sink_size"]), int(held["recent_size"])))
