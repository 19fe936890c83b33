"""Refusals of a command: one line for what the user can mend, with the command that installs a missing package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
def refusals(refuse: Callable[[str], object], *others: type[Exception]) -> Iterator[None]:
    """End a command with a message if a package is missing, or a file or a value is refused.

    Args:
        refuse: Ends the command with a message, as the `error` of an argparse parser does.
        *others: Other errors that are refusals.
    """
    refused: tuple[type[Exception], ...] = (ImportError, OSError, ValueError, *others)
    try:
        yield
    except refused as error:
        text = with_remedy(error) if isinstance(error, ImportError) else str(error)
        refuse(text or type(error).__name__)
