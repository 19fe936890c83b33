"""The command: reads the logs of runs and writes their page."""

from __future__ import annotations

import argparse
import sys

from sparse_prune.commands.report import compare, page
from sparse_prune.commands.report.logs import read_run
from sparse_prune.export.history import FOLDER
from sparse_prune.files import user_path, write_output
from sparse_prune.refusals import refusals


def main(args: list[str] | None = None) -> None:
    """Run `sparse-prune report RUN [RUN ...] [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="sparse-prune report",
        description="One HTML page of a run, or of several beside each other, from their logs; no network is needed.",
    )
    what = "folder of a run with a CSVLogger or W&B's files, or a folder above it; several are compared"
    parser.add_argument("run", type=user_path, nargs="+", help=what)
    parser.add_argument(
        "--output", type=user_path, help="where to write; report.html, or comparison.html, beside the first logs"
    )
    given = parser.parse_args(args)
    with refusals(parser.error):
        runs = [read_run(run) for run in given.run]
        text = page.render(runs[0]) if len(runs) == 1 else compare.render(runs)
    first = runs[0]
    if len(runs) == 1 and not first.steps:
        where = (first.history or first.folder) / FOLDER
        print(f"No frames of a pattern history in {where}: the page shows no patterns.", file=sys.stderr)
    target = given.output or first.folder / ("report.html" if len(runs) == 1 else "comparison.html")
    write_output(parser, target, text)
    print(target)
