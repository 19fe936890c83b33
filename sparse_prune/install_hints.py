"""Refusals of a command, with the command that installs a missing package."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

REQUIREMENTS = {
    "datasets": "sparse_prune[recipes]",
    "gguf": "sparse_prune[recipes]",
    "huggingface_hub": "sparse_prune[hf]",
    "jsonargparse": "sparse_prune[recipes]",
    "matplotlib": "sparse_prune[wandb]",
    "timm": "timm",
    "transformers": "sparse_prune[hf]",
    "wandb": "sparse_prune[wandb]",
    "wandb_workspaces": "sparse_prune[wandb]",
}
"""Module -> requirement that installs it: an extra of sparse_prune, or a package."""


def with_remedy(error: ImportError) -> str:
    """Return an import error's message, with the command that installs the package if it is in `REQUIREMENTS`."""
    wanted = REQUIREMENTS.get((error.name or "").partition(".")[0])
    return str(error) if wanted is None else f"{error}. Run `pip install '{wanted}'`."


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End a command with a usage error if a package is missing, or a file or value is refused."""
    try:
        yield
    except ImportError as error:
        parser.error(with_remedy(error))
    except (OSError, ValueError) as error:
        parser.error(str(error))
