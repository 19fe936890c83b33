"""Loading a causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_prune.attention import list_layers
from sparse_prune.recipes.base.pretrained import locate


def load_model(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model; `model` and further errors as in `locate`.

    Args:
        model: What to load.
        dtype: Of the parameters. Casting a loaded model would cast rotary frequencies as well, which loading does not.

    Raises:
        OSError: If the hub does not have the model or cannot be reached.
        ValueError: If tokens see those behind them, which they are to predict, as in BERT.
    """
    from transformers import AutoModelForCausalLM

    where, options = locate(model)
    try:
        found = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    except Exception as error:
        if "gguf_file" not in options or isinstance(error, ImportError | MemoryError):
            raise
        file = str(Path(where) / options["gguf_file"])
        raise ValueError(
            f"`model` must be a whole GGUF file of a kind that transformers reads, got {file!r}: {error}. Copy it "
            "again, or name another."
        ) from error
    layers = [layer for layer in list_layers(found) if layer.problem is None]
    if layers and not any(layer.causal for layer in layers):
        raise ValueError(
            f"`model` must be a causal language model, got {type(found).__name__} of {model!r}, whose tokens see those "
            "behind them. Name another."
        )
    return found
