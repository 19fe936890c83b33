"""Makes a workspace and a report on a W&B server, or writes their specification to a file."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from sparse_prune.files import user_path, write_output
from sparse_prune.refusals import refusals

if TYPE_CHECKING:
    from sparse_prune.commands.dashboard.views import Target

_PATH = re.compile(r"^(?:https?://[^/]+/)?(?:([^/]+)/)?([^/]+?)(?:/(?:runs/)?([^/?]+))?/?(?:\?.*)?$")


def main(args: list[str] | None = None) -> None:
    """Run `sparse-prune dashboard ENTITY/PROJECT[/RUN] [--baseline RUN] [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="sparse-prune dashboard", description="A W&B workspace and a report for pruning runs, charts laid out."
    )
    parser.add_argument("target", help="ENTITY/PROJECT for all runs, ENTITY/PROJECT/RUN_ID for one, or their address")
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN_ID", help="more runs to show")
    parser.add_argument("--baseline", metavar="RUN_ID", help="the run without pruning, shown beside the others")
    parser.add_argument("--name", default="Attention pruning", help="name of the workspace, title of the report")
    parser.add_argument("--output", type=user_path, help="write both as JSON to this file and ask no server")
    given = parser.parse_args(args)
    with refusals(parser.error):
        from sparse_prune.commands.dashboard.views import report, workspace

        target = parse_target(given.target, given.runs, given.baseline)
    view, page = workspace(target, given.name), report(target, given.name, online=given.output is None)
    if given.output:
        write_output(parser, given.output, json.dumps(specification(view, page), indent=2))
        print(given.output)
        return
    for made in (view, page):
        try:
            made.save()
        except Exception as error:  # W&B's client has many kinds of errors
            parser.exit(1, f"{type(made).__name__} not saved: {error}\nLog in with `wandb login`, or use --output.\n")
        print(made.url)


def parse_target(target: str, runs: list[str], baseline: str | None) -> Target:
    """Parse a path or an address as W&B prints it.

    Raises:
        ValueError: If it does not name an entity and a project.
    """
    from sparse_prune.commands.dashboard.views import Target

    found = _PATH.match(target)
    if found is None or not found[1]:
        raise ValueError(f"`target` must be ENTITY/PROJECT or ENTITY/PROJECT/RUN_ID, got {target!r}.")
    first = [found[3]] if found[3] and found[3] not in ("runs", "workspace") else []
    return Target(found[1], found[2], tuple(dict.fromkeys(first + runs)), baseline)


def specification(view: Any, page: Any) -> dict[str, Any]:
    """Return what would be sent to the server."""
    return {
        "workspace": view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
        "report": page._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
    }
