"""The last lines that a run prints: what was gained and lost, where the files are, what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_prune.recipes.base.report import RunReport
from sparse_prune.words import duration, factor


def won_and_lost(report: RunReport) -> tuple[str, str]:
    """Return two sentences on what pruning won and lost against the dense run; they omit what did not change.

    Args:
        report: The report. Without a dense run the first sentence has the cache alone, the second what to add.
    """
    changes = [*_speed(report), *_cache(report), *_loss(report), *_quality(report)]
    won, lost = ([text for better, text in changes if better is wanted] for wanted in (True, False))
    pruned = f"{report.sparsity:.1%} of the attention blocks pruned"
    first = f"Won, with {pruned}: {'; '.join(won)}." if won else f"Won, with {pruned}: nothing."
    if report.dense is None:
        lost.append("loss and speed were not compared, which --compare_dense true does")
    return first, f"Lost: {'; '.join(lost) or 'nothing that was measured'}."


def where_and_next(report: Path, folder: Path, export: str | None, commands: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the paths of all files, and with commands to run next, ready to copy.

    Args:
        report: File of the report.
        folder: Folder of the run: logs, settings, patterns.
        export: Folder of the exported model; None without one.
        commands: Arguments of `sparse-prune`.
    """
    lines = [f"Report: {report}", f"Logs, settings, patterns: {folder}"]
    if export is not None:
        lines.append(f"Pruned model with its patterns: {export}")
    return [*lines, "Next:", *(f"  {shlex.join([_program(), *command])}" for command in commands)]


def _program() -> str:
    """Return the command for a shell: its name, or its path if the name is unknown or means another program."""
    own = Path(sys.executable).parent / "sparse-prune"
    if not own.exists() or shutil.which("sparse-prune") == str(own):
        return "sparse-prune"
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)


def _speed(report: RunReport) -> list[tuple[bool, str]]:
    times = report.step_seconds()
    if report.dense is None or "sparse" not in times or "dense" not in times:
        return []
    dense, sparse = times["dense"], times["sparse"]
    gain, both = factor(dense / sparse, "faster", "slower"), f"{duration(sparse)} against {duration(dense)}"
    return [(sparse <= dense, f"a step with swapped layers is {gain} ({both})")]


def _cache(report: RunReport) -> list[tuple[bool, str]]:
    if report.cache is None or report.cache.pruned.kv_bytes == report.cache.dense.kv_bytes:
        return []
    small, large = report.cache.pruned.kv_bytes, report.cache.dense.kv_bytes
    gain, both = factor(large / max(small, 1), "smaller", "larger"), f"{small / 2**20:.3g} against {large / 2**20:.3g}"
    return [(small < large, f"the KV cache of {report.cache.length} tokens is {gain} ({both} MiB)")]


def _loss(report: RunReport) -> list[tuple[bool, str]]:
    if report.dense is None:
        return []
    dense = report.dense.loss_after
    change = f"{report.loss / dense - 1.0:+.2%} ({report.loss:.4f} against {dense:.4f})"
    return [(report.loss < dense, f"held-out loss {change}")]


def _quality(report: RunReport) -> list[tuple[bool, str]]:
    beside = {} if report.dense is None else report.dense.quality
    pairs = [(name, value, beside[name]) for name, value in report.quality.items() if name in beside]
    return [
        (value > dense, f"{name} {value:.1%} against {dense:.1%}") for name, value, dense in pairs if value != dense
    ]
