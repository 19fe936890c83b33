"""Loading a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from sparse_prune.recipes.finetune.pretrained import locate


def load_model(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model; `model` and further errors as in `locate`.

    Args:
        model: What to load.
        dtype: Of the parameters. Casting a loaded model would cast rotary frequencies as well, which loading does not.

    Raises:
        OSError: If the hub does not have the model or cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    where, options = locate(model)
    return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
