"""Plot and tables of docs/frontier.md, from what benchmarks/frontier.py wrote.

    python benchmarks/frontier_page.py benchmarks/results/frontier_cpu.json

Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the page, where NAME is a result file's stem, and
draws docs/frontier/NAME.png.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from sparse_prune import reports

BASES = ("gradual, cubic", "gradual, diagonals half shared", "short ramp, questions", "short ramp", "dense, questions")
"""What variants are compared with: the first of these that was run."""
DENSE = ("dense", "dense, questions")
"""The dense fine-tune of the same steps: the first of these that was run."""
MARGIN = 1e-3
"""Changes of the loss up to this share of it are no change."""


@dataclass(frozen=True)
class Result:
    """One method at one sparsity: rows of all its seeds, beside those of dense and of what it is compared with."""

    method: str
    sparsity: float
    rows: Sequence[Mapping[str, Any]]
    dense: Mapping[int, float]
    """Seed -> loss of the dense fine-tune."""
    against: str
    """The method that it is compared with."""
    base: Mapping[int, float]
    """Seed -> that method's loss at this sparsity."""

    @property
    def rises(self) -> list[float]:
        """Loss over that of the dense fine-tune of the same seed, less 1."""
        return [row["loss"] / self.dense[row["seed"]] - 1.0 for row in self.rows]

    @property
    def verdict(self) -> str:
        """Whether every seed ended below `against` by more than `MARGIN`, or every one above it."""
        changes = [row["loss"] / self.base[row["seed"]] - 1.0 for row in self.rows if row["seed"] in self.base]
        if self.method in (*DENSE, self.against) or not changes:
            return ""
        if all(change < -MARGIN for change in changes):
            return "better"
        return "worse" if all(change > MARGIN for change in changes) else "mixed"

    def cells(self) -> list[str]:
        """Row of the table."""
        loss, achieved = (mean(row[key] for row in self.rows) for key in ("loss", "achieved"))
        rises = " / ".join(f"{rise:+.2%}" for rise in self.rises)
        tasks = [_share([row["tasks"][task] for row in self.rows]) for task in self.rows[0]["tasks"]]
        return [self.method, f"{achieved:.1%}", f"{loss:.4f}", rises, *tasks, self.verdict]


def _share(scores: Sequence[Mapping[str, float]]) -> str:
    """Mean accuracy over the seeds; of one seed with its interval, where the file has one."""
    text = f"{mean(score['accuracy'] for score in scores):.0%}"
    if len(scores) == 1 and "low" in scores[0]:
        text += f" ({scores[0]['low']:.0%} to {scores[0]['high']:.0%})"
    return text


def results(rows: Sequence[Mapping[str, Any]]) -> list[Result]:
    """By sparsity, then by loss.

    Raises:
        ValueError: If the dense fine-tune of a seed is missing.
    """
    run = {row["method"] for row in rows}
    against, twin = (next((name for name in names if name in run), names[0]) for names in (BASES, DENSE))
    dense = {row["seed"]: row["loss"] for row in rows if row["method"] == twin}
    alone = sorted({row["seed"] for row in rows} - set(dense))
    if alone:
        raise ValueError(f"`rows` must hold {twin!r} of every seed, got none of {alone}. Run it: --seeds, --only.")
    found = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        here = [row for row in rows if row["sparsity"] == sparsity]
        base = {row["seed"]: row["loss"] for row in here if row["method"] == against}
        methods = dict.fromkeys(row["method"] for row in here)
        group = [
            Result(method, sparsity, [row for row in here if row["method"] == method], dense, against, base)
            for method in methods
        ]
        found += sorted(group, key=lambda result: mean(row["loss"] for row in result.rows))
    return found


def table(found: Sequence[Result], setup: Mapping[str, Any]) -> str:
    """Markdown: the settings in a sentence, then a line per result."""
    tasks = [f"{task.replace('_', ' ')}:" for task in found[0].rows[0]["tasks"]]
    columns = ["method", "pruned:", "loss:", "over dense, per seed:", *tasks, f"against {found[0].against}"]
    rows = [result.cells() for result in found]
    if not any(result.verdict for result in found):  # nothing is compared
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return (
        f"{setup['length']} tokens, blocks of {setup['block_size']}, {setup['steps']} optimizer steps at "
        f"{setup['learning_rate']:g}, loss on {setup['tests']} held-out sequences, "
        f"{setup['questions per task']} questions a task; {setup['machine']}; {setup['versions']}.\n\n"
        f"{reports.table(columns, rows)}\n"
    )


def draw(found: Sequence[Result], path: Path) -> None:
    """A panel per sparsity: a dot per method and seed."""
    from matplotlib.figure import Figure

    sparsities = sorted({result.sparsity for result in found if result.sparsity > 0})
    tallest = max(sum(result.sparsity == s for result in found) for s in sparsities)
    figure = Figure(figsize=(1.5 + 5.5 * len(sparsities), 1.3 + 0.28 * tallest), layout="constrained")
    for index, sparsity in enumerate(sparsities):
        here = [result for result in found if result.sparsity == sparsity][::-1]
        axes = figure.add_subplot(1, len(sparsities), index + 1)
        axes.set(title=f"{sparsity:.0%} pruned", xlabel="loss over the dense fine-tune, %")
        for place, result in enumerate(here):
            kind = "#1d4e89" if result.method.startswith("gradual") else "#d1495b"
            rises = [100 * rise for rise in result.rises]
            axes.plot(rises, [place] * len(rises), "o", color=kind, alpha=0.8)
        axes.set_yticks(range(len(here)), [result.method for result in here])
        axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def replace_between(page: str, name: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: If the page has no such markers.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"The page must hold `<!-- {name} -->` and `<!-- end -->` on lines of their own. Add them.")
    return pattern.sub(lambda found: f"{found[1]}{text}{found[2]}", page)


def main() -> None:
    """Parse arguments, draw, rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "frontier.md")
    given = parser.parse_args()
    for file in given.results:
        saved = json.loads(file.read_text())
        try:
            found = results(saved["rows"])
        except ValueError as error:
            parser.error(f"{file}: {error}")
        draw(found, given.page.parent / "frontier" / f"{file.stem}.png")
        given.page.write_text(replace_between(given.page.read_text(), file.stem, table(found, saved["setup"])))


if __name__ == "__main__":
    main()
