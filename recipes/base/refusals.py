"""Refusals of a command line: one line with the remedy, exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning_fabric.utilities.exceptions import MisconfigurationException

from sparse_prune.install_hints import with_remedy

_SHIPPED = "sparse_prune.recipes."


def program_of(package: str) -> str:
    """Return the command that runs a recipe."""
    name = package.removeprefix(_SHIPPED)
    return f"python -m {package} fit" if name == package else f"sparse-prune recipes run {name}"


@contextmanager
def refusals(program: str, debug: bool) -> Iterator[None]:
    """End the process with one line if values, files, packages or the Trainer's settings are refused."""
    try:
        yield
    except (ImportError, MisconfigurationException, OSError, TypeError, ValueError) as error:
        if debug:
            raise
        text = with_remedy(error) if isinstance(error, ImportError) else str(error)
        end_with(program, f"{(text or type(error).__name__).rstrip('. ')}. --debug shows where it came from.")


def end_with(program: str, text: str) -> NoReturn:
    """End the process with one line on stderr and exit status 2."""
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)
