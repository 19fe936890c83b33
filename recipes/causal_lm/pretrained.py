"""Loading a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from sparse_prune.recipes.finetune.pretrained import locate


def load_model(model: str) -> Any:
    """A causal language model in float32; arguments and errors as in `locate`.

    Raises:
        OSError: If the hub does not have the model or cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    where, options = locate(model)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
