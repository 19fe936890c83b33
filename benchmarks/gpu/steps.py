"""Stages e and f: steps at 8K tokens before and after the swap, pruned and dense; run by `campaign.py`.

Each step is a row: wall clock, host, peak memory, sparsity, loss, what the swap measured. Medians are printed of the
steps before the swap that decided nothing, of those that probed and decided, and of the swapped ones.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from gpu.session import DEVICE, about
from gpu.training import Module, Steps, fit, llama, pruning, text
from rows import Rows


def trained(size: str, model: Path | None, length: int, block: int, steps: int, pruned: bool) -> list[dict[str, Any]]:
    """Rows of one run: half its steps move patterns, the other half are swapped."""
    every = max(2, steps // 20)
    backend = "auto" if DEVICE == "cuda" else "triton"
    callback = pruning(0.8 if DEVICE == "cuda" else 0.4, steps // 2 - every, every, block, backend) if pruned else None
    clock = Steps(callback)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [clock] if callback is None else [callback, clock]
        fit(Module(llama(size, length, model)), text(length, steps), callbacks, steps, Path(folder))
    return [{"run": "pruned" if pruned else "dense", **row} for row in clock.rows]


def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of wall clock less measurements, by kind of step; the first two warm up, and what measured is left out."""
    calm = [row for row in rows if row["step"] > 2 and not row["measuring_s"]]
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "dense run": lambda row: row["run"] == "dense",
        "moving": lambda row: row["run"] == "pruned" and not row["swapped"] and not row["decided"],
        "deciding": lambda row: row["run"] == "pruned" and not row["swapped"] and row["decided"],
        "swapped": lambda row: bool(row["swapped"]),
    }
    chosen = {name: [row for row in calm if of_kind(row)] for name, of_kind in kinds.items()}
    return {
        name: {"steps": len(found), **{key: median(row[key] for row in found) for key in ("wall_s", "host_s")}}
        for name, found in chosen.items()
        if found
    }


def main() -> None:
    """Runs that the output does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", default="small", choices=["small", "smollm2"])
    parser.add_argument("--model", type=Path, help="folder of a transformers model; else random weights of this size")
    parser.add_argument("--dense", action="store_true", help="a run without pruning as well")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    size, length, block, steps = (
        ("tiny", 64, 16, 16) if arguments.rehearse else (arguments.size, 8192, 128, 100)
    )  # fmt: skip
    setup = {"size": size, "model": arguments.model and str(arguments.model), "length": length, "steps": steps}
    kept = Rows(arguments.output, setup, about())
    if arguments.model is None:
        print(f"The weights are random, of the size {size}. `--model FOLDER` takes trained ones.", flush=True)
    for pruned in (True, False) if arguments.dense else (True,):
        name = "pruned" if pruned else "dense"
        if name not in {row["run"] for row in kept.rows}:
            call = partial(trained, size, arguments.model, length, block, steps, pruned)
            kept.add(*(kept.attempt(name, call) or ()))
    for kind, found in medians(kept.rows).items():
        print(
            f"summary: {kind}: {found['wall_s']:.4f} s a step, the host {found['host_s']:.4f} s, {found['steps']} steps"
        )
    for name in {row["run"] for row in kept.rows}:
        losses = [row["loss"] for row in kept.rows if row["run"] == name]
        peaks = [row["peak_bytes"] or 0 for row in kept.rows if row["run"] == name]
        print(f"summary: {name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, peak {max(peaks) / 2**30:.2f} GiB")
    kept.finish()


if __name__ == "__main__":
    main()
