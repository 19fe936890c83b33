"""The report at the end of a run, as text, data and a picture."""

from __future__ import annotations

import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_prune.callbacks import SwapEvent
from sparse_prune.evaluation import CacheCost
from sparse_prune.pattern import BlockPattern
from sparse_prune.pictures import LayerView, draw_atlas
from sparse_prune.recipes.base.history import StepRecord
from sparse_prune.reports import table, write_report
from sparse_prune.words import factor


@dataclass(frozen=True)
class DenseRun:
    """The same fine-tune without pruning."""

    loss_before: float
    """Test loss before any training, in nats."""
    loss_after: float
    records: list[StepRecord]
    quality: Mapping[str, float] = field(default_factory=dict)
    """As in `RunReport`."""


@dataclass(frozen=True)
class CacheComparison:
    """Measured KV cache and speed of generation after one sequence, by the same weights with and without patterns."""

    length: int
    """Tokens of the sequence."""
    dense: CacheCost
    pruned: CacheCost

    def verdict(self) -> str:
        """Return the comparison as a sentence."""
        large, small = self.dense.kv_bytes, self.pruned.kv_bytes
        return (
            f"The KV cache of {self.length} tokens takes {small / 2**20:.1f} MiB by the allocator, without patterns "
            f"{large / 2**20:.1f} MiB ({factor(large / max(small, 1), 'smaller', 'larger')}); decoding runs at "
            f"{self.pruned.decode_tokens_per_s:.1f} tokens/s, without patterns at {self.dense.decode_tokens_per_s:.1f}."
        )


@dataclass(frozen=True)
class RunReport:
    """The report of a run."""

    setup: Mapping[str, Any]
    """Model, lengths, versions, machine: everything that is needed to repeat the run."""
    loss: float
    """Test loss of the pruned model, in nats: per token for language models, per example for classifiers."""
    sparsity: float
    layers: list[str]
    records: list[StepRecord]
    events: list[SwapEvent]
    patterns: Mapping[str, BlockPattern]
    savings: Mapping[str, float]
    quality: Mapping[str, float] = field(default_factory=dict)
    """Other qualities of the model, name -> share in [0, 1]: accuracy, passkeys found."""
    dense: DenseRun | None = None
    cache: CacheComparison | None = None
    notes: Sequence[str] = ()
    """Sentences that explain the figures."""

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.md, report.json and report.png, each whole or not at all; return the path of the text."""
        return write_report(folder, "report", self.as_dict(), self.text(), self._draw)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types, without the patterns themselves."""
        return {
            "setup": dict(self.setup),
            "loss": self.loss,
            "sparsity": self.sparsity,
            "quality": dict(self.quality),
            "step_seconds": self.step_seconds(),
            "verdicts": self.verdicts(),
            "savings": dict(self.savings),
            "layer_sparsity": {name: pattern.sparsity for name, pattern in self.patterns.items()},
            "events": [asdict(event) for event in self.events],
            "records": [asdict(record) for record in self.records],
            "dense": None if self.dense is None else asdict(self.dense),
            "cache": None if self.cache is None else asdict(self.cache),
        }

    def step_seconds(self) -> dict[str, float]:
        """Return the median seconds of a step per phase, probing steps apart, without the first step (warm-up).

        "dense" is the dense fine-tune if there is one.
        """
        groups: dict[str, list[float]] = {}
        for record in self.records[1:]:
            if record.phase != "dense" or self.dense is None:
                groups.setdefault(record.phase + (" + probe" if record.probed else ""), []).append(record.seconds)
        if self.dense is not None:
            groups["dense"] = [record.seconds for record in self.dense.records[1:]]
        return {name: statistics.median(times) for name, times in sorted(groups.items()) if times}

    def verdicts(self) -> list[str]:
        """Return the results as plain sentences."""
        swapped = [event for event in self.events if event.backend != "dense"]
        lines = [
            f"{self.sparsity:.1%} of the possible attention blocks are pruned.",
            f"{len(self.events)} of {len(self.layers)} layers settled; {len(swapped)} run sparse, "
            f"{len(self.events) - len(swapped)} gained nothing and got their connections back.",
        ]
        if self.dense is None:
            lines.append(f"Held-out loss {self.loss:.4f}.")
        else:
            change = self.loss / self.dense.loss_after - 1.0
            lines.append(
                f"Held-out loss {self.loss:.4f}, dense fine-tune {self.dense.loss_after:.4f} ({change:+.2%}), "
                f"before training {self.dense.loss_before:.4f}."
            )
        if self.cache is not None:
            lines.append(self.cache.verdict())
        times = self.step_seconds()
        if "sparse" not in times:
            lines.append("No step ran with every settled layer swapped, so there is no sparse step time.")
        elif "dense" in times:
            gain = times["dense"] / times["sparse"]
            faster = "faster" if gain > 1 else "NOT faster"
            lines.append(
                f"A step with swapped layers takes {times['sparse']:.2f} s and is {faster} than the dense step "
                f"({times['dense']:.2f} s): {gain:.2f}x."
            )
            if gain <= 1:
                lines.append("Attention is too small a share of the step at this length: use longer contexts.")
        return [*lines, *self.notes]

    def text(self) -> str:
        """Return the report as Markdown."""
        by_layer = {event.layer: event for event in self.events}
        layers = [_layer_row(name, self.patterns.get(name), by_layer.get(name)) for name in self.layers]
        tables = {
            "Step time": table(("phase", "median s:"), [(k, f"{v:.2f}") for k, v in self.step_seconds().items()]),
            "Estimated savings": table(("what", "value:"), [(k, f"{v:.4g}") for k, v in self.savings.items()]),
            "Layers": table(("layer", "sparsity:", "settled at:", "now", "dense ms:", "sparse ms:"), layers),
            "Setup": table(("what", "value"), self.setup.items()),
        }
        sections = "\n".join(f"## {title}\n\n{text}\n" for title, text in tables.items())
        verdicts = "".join(f"- {line}\n" for line in (*self.verdicts(), *self.qualities()))
        return f"# Attention pruning report\n\n{verdicts}\n![Run](report.png)\n\n{sections}"

    def qualities(self) -> list[str]:
        """Return the other qualities as plain sentences."""
        dense = self.dense.quality if self.dense is not None else {}
        beside = {name: f", dense fine-tune {value:.1%}" for name, value in dense.items()}
        return [f"{name.capitalize()} {value:.1%}{beside.get(name, '')}." for name, value in self.quality.items()]

    def _draw(self, path: Path) -> None:
        """Draw the picture in the order of `sparse-prune report`: verdicts, patterns, charts over the steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(15, 13), layout="constrained")
        figure.suptitle("\n".join(textwrap.fill(line, 130) for line in self.verdicts()), x=0.01, ha="left", fontsize=12)
        grid = figure.add_gridspec(3, 2, height_ratios=(1.9, 1, 1))
        atlas = figure.add_subplot(grid[0, :], title="Kept blocks (dark) per layer (columns) and head (rows)")
        atlas.imshow(draw_atlas([LayerView(self.patterns[name]) for name in self.layers if name in self.patterns]))
        atlas.set_axis_off()
        share = figure.add_subplot(grid[1, 1], title="Share of blocks pruned", ylabel="share of blocks", ylim=(0, 1))
        loss = figure.add_subplot(grid[1, 0], title="Training loss", ylabel="nats", sharex=share)
        seconds = figure.add_subplot(grid[2, 1], title="Step time", ylabel="seconds", sharex=share)
        layer = figure.add_subplot(grid[2, 0], title="Sparsity per layer", xlabel="layer", ylabel="share", ylim=(0, 1))
        self._chart(loss, "loss", "pruned")
        asked = [record for record in self.records if record.requested is not None]
        if asked:
            share.plot(*_curve(asked, "requested"), label="requested", color="#b3bbc8", linewidth=4)
        self._chart(share, "sparsity", "achieved")
        found = [self.patterns[name].sparsity if name in self.patterns else 0.0 for name in self.layers]
        layer.bar(range(len(found)), found, color="#1d4e89")
        layer.locator_params(axis="x", integer=True, min_n_ticks=1)
        # The first step warms up: its time means nothing.
        self._chart(seconds, "seconds", "pruned", first=1)
        figure.savefig(path, dpi=110, format="png")

    def _chart(self, axes: Any, what: str, label: str, first: int = 0) -> None:
        """Draw a number per step over that of the dense run, and mark the swaps."""
        if self.dense is not None and what != "sparsity":
            axes.plot(*_curve(self.dense.records[first:], what), label="dense twin", color="#b3bbc8", linewidth=4)
        axes.plot(*_curve(self.records[first:], what), label=label, color="#1d4e89")
        for number, step in enumerate(sorted({event.step for event in self.events})):
            axes.axvline(step, color="#d1495b", linestyle=":", label=None if number else "layers swapped")
        axes.set_xlabel("optimizer steps taken")
        axes.legend()


def _curve(records: list[StepRecord], what: str) -> tuple[list[int], list[float]]:
    return [record.step for record in records], [getattr(record, what) for record in records]


def _layer_row(name: str, pattern: BlockPattern | None, event: SwapEvent | None) -> tuple[object, ...]:
    sparsity = "" if pattern is None else f"{pattern.sparsity:.1%}"
    if event is None:
        return name, sparsity, "not settled", "masked", "", ""
    times = ("" if ms is None else f"{ms:.1f}" for ms in (event.dense_ms, event.sparse_ms))
    return name, sparsity, event.step, event.backend, *times
