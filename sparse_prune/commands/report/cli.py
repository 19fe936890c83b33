"""The command: read a run's logs, write its page."""

from __future__ import annotations

import argparse
import sys

from sparse_prune.commands.report.logs import read_run
from sparse_prune.commands.report.page import render
from sparse_prune.export.history import FOLDER
from sparse_prune.files import user_path, write_output


def main(args: list[str] | None = None) -> None:
    """`sparse-prune report RUN [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="sparse-prune report", description="One HTML page of a run, made from its logs; it needs no network."
    )
    parser.add_argument("run", type=user_path, help="folder of a run with a CSVLogger, or a folder above it")
    parser.add_argument("--output", type=user_path, help="where to write; report.html beside the logs by default")
    given = parser.parse_args(args)
    try:
        logs = read_run(given.run)
        page = render(logs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not logs.steps:
        print(f"No frames of a pattern history in {logs.folder / FOLDER}: the page shows no patterns.", file=sys.stderr)
    target = given.output or logs.folder / "report.html"
    write_output(parser, target, page)
    print(target)
