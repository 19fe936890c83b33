"""What to install when a package is missing."""

from __future__ import annotations

EXTRAS = {
    "datasets": "recipes",
    "gguf": "recipes",
    "huggingface_hub": "hf",
    "jsonargparse": "recipes",
    "matplotlib": "wandb",
    "transformers": "hf",
    "wandb": "wandb",
    "wandb_workspaces": "wandb",
}
"""Package -> the extra of sparse_prune that brings it."""


def with_remedy(error: ImportError) -> str:
    """What an error says, and the command that installs what is missing, where one of `EXTRAS` brings it."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    return str(error) if extra is None else f"{error}. Run `pip install 'sparse_prune[{extra}]'`."
