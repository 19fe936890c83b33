"""`sparse-prune COMMAND ...`, also `python -m sparse_prune COMMAND ...`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from sparse_prune.commands import COMMANDS


def main(args: list[str] | None = None) -> None:
    """Run the command that the first argument names, with the other arguments."""
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
