"""`sparse-prune COMMAND ...`, also `python -m sparse_prune COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "dashboard": ("sparse_prune.recipes.dashboard.cli", "a W&B workspace and a report, charts laid out"),
    "evaluate": (
        "sparse_prune.recipes.evaluate.cli",
        "perplexity, retrieval, KV bytes and speed, dense against pruned",
    ),
    "layers": ("sparse_prune.recipes.layers.cli", "which attention layers of a model can be pruned, and why not"),
    "recipes": ("sparse_prune.recipes.catalogue.cli", "list the shipped fine-tuning runs, copy one, run one"),
    "report": ("sparse_prune.recipes.run_report.cli", "one HTML page of a run, from its logs"),
}
"""Name -> module whose `main(args)` runs it, and what it does."""


def main(args: list[str] | None = None) -> None:
    """Hand the rest of the command line to a command."""
    commands = "\n".join(f"  {name:12} {help_text}" for name, (_, help_text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sparse-prune",
        description=f"commands:\n{commands}",
        epilog="sparse-prune COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    given = list(sys.argv[1:] if args is None else args)
    command = parser.parse_args(given[:1]).command
    import_module(COMMANDS[command][0]).main(given[1:])


if __name__ == "__main__":
    main()
