"""The report of an evaluation, dense and pruned side by side: as text, data and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparse_prune.evaluation import CacheCost, meter
from sparse_prune.evaluation.meter import TaskScore
from sparse_prune.reports import table, write_report
from sparse_prune.words import factor

_DENSE, _PRUNED = "#9aa3b2", "#1d4e89"


@dataclass(frozen=True)
class LengthResult:
    """The measurements at one length."""

    length: int
    """Tokens."""
    loss: float
    """Nats per token, through the cache."""
    passkey: list[float]
    """Share of right answers per depth, in [0, 1]; empty if there were no prompts."""
    needle: list[float]
    """As `passkey`, for a fact in real text."""
    cost: CacheCost

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class TaskResult:
    """The scores of both models in one retrieval task."""

    name: str
    length: int
    """Tokens."""
    dense: TaskScore
    pruned: TaskScore


@dataclass(frozen=True)
class EvaluationReport:
    """The report of two models at the same lengths on the same text."""

    setup: Mapping[str, Any]
    """Model, text, versions, machine."""
    sparsity: float
    """Share of possible blocks that are pruned, in [0, 1]."""
    depths: tuple[float, ...]
    dense: list[LengthResult]
    pruned: list[LengthResult]
    tasks: Sequence[TaskResult] = ()
    """Retrieval tasks, if any were asked."""

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write evaluation.md, evaluation.json and evaluation.png, each whole or not at all; return the text's path."""
        return write_report(folder, "evaluation", self.as_dict(), self.text(), self._draw)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        tasks = [
            {"task": task.name, "length": task.length, "dense": _score(task.dense), "pruned": _score(task.pruned)}
            for task in self.tasks
        ]
        return asdict(replace(self, tasks=())) | {"ratios": self.ratios(), "tasks": tasks}

    def ratios(self) -> list[dict[str, float]]:
        """Return, per length, the rise of the perplexity and the factors of cache size and speed."""
        return [
            {
                "length": d.length,
                "perplexity_rise": p.perplexity / d.perplexity - 1.0,
                "kv_bytes": d.cost.kv_bytes / max(p.cost.kv_bytes, 1),
                "prefill": p.cost.prefill_tokens_per_s / d.cost.prefill_tokens_per_s,
                "decode": p.cost.decode_tokens_per_s / d.cost.decode_tokens_per_s,
            }
            for d, p in zip(self.dense, self.pruned, strict=True)
        ]

    def table(self) -> str:
        """Return a Markdown table with a row per length and dense / pruned in every cell."""
        rows = []
        for d, p, ratio in zip(self.dense, self.pruned, self.ratios(), strict=True):
            smaller = factor(ratio["kv_bytes"], "smaller", "larger")
            rows.append(
                (
                    d.length,
                    f"{d.perplexity:.3f} / {p.perplexity:.3f} ({ratio['perplexity_rise']:+.2%})",
                    f"{_mean(d.passkey)} / {_mean(p.passkey)}",
                    f"{_mean(d.needle)} / {_mean(p.needle)}",
                    f"{d.cost.kv_bytes / 2**20:.2f} / {p.cost.kv_bytes / 2**20:.2f} ({smaller})",
                    f"{d.cost.prefill_tokens_per_s:.0f} / {p.cost.prefill_tokens_per_s:.0f} ({ratio['prefill']:.2f}x)",
                    f"{d.cost.decode_tokens_per_s:.1f} / {p.cost.decode_tokens_per_s:.1f} ({ratio['decode']:.2f}x)",
                )
            )
        costs = ("KV cache, MiB:", "prefill, tokens/s:", "decode, tokens/s:")
        return table(("tokens:", "perplexity:", "passkey:", "needle:", *costs), rows)

    def text(self) -> str:
        """Return the report as Markdown."""
        depths = ""
        if self.dense and self.dense[0].passkey:
            rows = [
                (task, d.length, *(f"{a:.0%} / {b:.0%}" for a, b in zip(one, two, strict=True)))
                for d, p in zip(self.dense, self.pruned, strict=True)
                for task, one, two in (("passkey", d.passkey, p.passkey), ("needle", d.needle, p.needle))
            ]
            columns = ("task", "tokens:", *(f"{depth:.0%}:" for depth in self.depths))
            depths = f"\n## Retrieval by depth\n\n{table(columns, rows)}\n"
        return (
            f"# Evaluation\n\nDense / pruned, {self.sparsity:.1%} of the possible attention blocks pruned.\n\n"
            f"{self.table()}\n\n![Evaluation](evaluation.png)\n{depths}{self._asked()}\n"
            "The loss runs through the cache in chunks, so what was evicted is missed. KV bytes are what the prefill\n"
            "of one sequence adds to the allocator's live bytes.\n\n"
            f"## Setup\n\n{table(('what', 'value'), self.setup.items())}\n"
        )

    def _asked(self) -> str:
        """The retrieval tasks, with their intervals."""
        if not self.tasks:
            return ""
        rows = [(task.name, task.dense, task.pruned) for task in self.tasks]
        head = f"\n## Retrieval tasks, {self.tasks[0].length} tokens\n\nShare right with its 95 % interval; "
        return f"{head}log-probability of the answer, dense / pruned.\n\n{meter.table(rows)}\n"

    def _draw(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 8), layout="constrained")
        panels: tuple[tuple[str, str, Callable[[LengthResult], float]], ...] = (
            ("Perplexity", "", lambda r: r.perplexity),
            ("Passkey", "share right", lambda r: _share(r.passkey)),
            ("Needle", "share right", lambda r: _share(r.needle)),
            ("KV cache", "MiB", lambda r: r.cost.kv_bytes / 2**20),
            ("Prefill", "tokens/s", lambda r: r.cost.prefill_tokens_per_s),
            ("Decode", "tokens/s", lambda r: r.cost.decode_tokens_per_s),
        )
        for index, (title, unit, value) in enumerate(panels, start=1):
            axis = figure.add_subplot(2, 3, index, title=title, xlabel="tokens", ylabel=unit)
            for name, results, colour in (("dense", self.dense, _DENSE), ("pruned", self.pruned, _PRUNED)):
                axis.plot([r.length for r in results], [value(r) for r in results], "o-", label=name, color=colour)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.legend()
        figure.savefig(path, dpi=110, format="png")


def _score(score: TaskScore) -> dict[str, Any]:
    depths = {str(depth): part.accuracy for depth, part in score.by_depth().items()}
    numbers = {"accuracy": score.accuracy, "interval": score.interval, "log_prob": score.log_prob}
    return numbers | {"questions": len(score.answers), "by_depth": depths}


def _share(shares: list[float]) -> float:
    return sum(shares) / len(shares) if shares else math.nan


def _mean(shares: list[float]) -> str:
    return f"{_share(shares):.0%}" if shares else "-"
