"""How all pictures look and are written: the same input gives the same file."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import ListedColormap

mpl.use("Agg")
mpl.rcParams.update({"svg.hashsalt": "sparse_prune", "font.size": 11, "axes.titlesize": 11})

HIDDEN, PRUNED, KEPT, EXTRA = "#ffffff", "#dfe3ec", "#1d4e89", "#f09628"
BLOCKS = ListedColormap([HIDDEN, PRUNED, KEPT, EXTRA])
"""Colours of blocks: 0 hidden by causality, 1 pruned, 2 kept, 3 pointed out."""


def save(figure: Any, name: str) -> None:
    """Write a figure beside this file."""
    metadata = {"Date": None} if name.endswith(".svg") else {"Software": None}
    figure.savefig(Path(__file__).with_name(name), bbox_inches="tight", dpi=160, metadata=metadata)
