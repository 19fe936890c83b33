"""Loading a causal language model."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from sparse_prune.attention import list_layers
from sparse_prune.recipes.base.pretrained import load_pretrained


def load_model(model: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model; `model` and further errors as in `load_pretrained`.

    Args:
        model: What to load.
        dtype: Dtype of the parameters. To cast a loaded model would cast its rotary frequencies as well.

    Raises:
        ValueError: If tokens see later ones, which they are to predict, as in BERT.
    """
    from transformers import AutoModelForCausalLM

    found = load_pretrained(AutoModelForCausalLM, model, dtype=dtype)
    layers = [layer for layer in list_layers(found) if layer.problem is None]
    if layers and not any(layer.causal for layer in layers):
        raise ValueError(
            f"`model` must be a causal language model, got {type(found).__name__} of {model!r}, whose tokens see "
            "later ones. Name another."
        )
    return found


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse a model whose attention does not end where position ids begin anew; a few tokens are tried.

    Raises:
        ValueError: If it takes no position ids, or if the outputs of a document depend on the document before it.
    """
    refused = f"`data.pack` must be false for {type(model).__name__}, which"
    if "position_ids" not in signature(model.forward).parameters:
        raise ValueError(f"{refused} takes no position ids, got true. Leave it out: documents are then joined.")
    training = model.training
    model.eval()
    ids = torch.tensor([[2, 3, 1, 2, 3, 1], [4, 5, 0, 2, 3, 1]], device=model.device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=model.device).expand(2, -1)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = model(input_ids=ids[:1, 3:], use_cache=False).logits
    model.train(training)
    if not torch.allclose(logits[:, 3:].float(), alone.float(), atol=1e-4 * float(alone.abs().max())):
        raise ValueError(
            f"{refused} lets packed documents see each other, got true. Leave it out: documents are then joined."
        )
