"""DuoAttention's folder of a pattern: a table of heads and a config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sparse_prune.export.formats.format import Format
from sparse_prune.export.heads import Reach, StreamingHeads
from sparse_prune.files import whole_file


class DuoAttention(Format):
    """`full_attention_heads.tsv`, a row per layer and a column per KV head, and `config.json` with the two sizes.

    What DuoAttention trained are numbers from 0 to 1 (and a little around); those of at least `threshold` are full.
    Its kernels round sinks and window up to blocks of 128 tokens, as patterns of that block size do; when it decodes,
    it holds them to the token. Source: https://github.com/mit-han-lab/duo-attention (arXiv:2410.10819).

    Args:
        threshold: Least value of a full head.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def _write(self, heads: StreamingHeads, folder: Path) -> None:
        with whole_file(folder / "full_attention_heads.tsv") as path:
            np.savetxt(path, np.array(heads.full, dtype=float), delimiter="\t")
        with whole_file(folder / "config.json") as path:
            sizes = {"sink_size": heads.reach.sink, "recent_size": heads.reach.recent}
            path.write_text(json.dumps(sizes) + "\n", encoding="utf-8")

    def _read(self, folder: Path) -> StreamingHeads:
        sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values = np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t", ndmin=2)
        full = tuple(tuple(row) for row in (values >= self.threshold).tolist())
        return StreamingHeads(full, Reach(int(sizes["sink_size"]), int(sizes["recent_size"])))
