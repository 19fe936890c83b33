"""A trial run of a model, and the description of its attention calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from sparse_prune.attention.masks import hides_future, is_bias
from sparse_prune.attention.modes import evaluating

BIAS = "adds a bias to attention (a mask with other values than 0 and -inf)"
"""Why a layer whose mask does more than hide keys cannot be pruned."""


_CROSS = re.compile(r"cross_?att(n|ention)|encoder_attn|encoder_decoder_attention|EncDecAttention|multihead_attn$")


def named_cross(name: str) -> bool:
    """Whether a module's name is one that transformers or torch use for cross-attention."""
    return _CROSS.search(name) is not None


@dataclass(frozen=True)
class TrialCall:
    """Describes one attention call."""

    num_heads: int
    num_kv_heads: int
    causal: bool
    problem: str | None = None
    """Why the call cannot be pruned; None: it can."""


TrialCalls = Mapping[str, list[TrialCall]]
"""Module -> attention calls of its latest forward pass, without those of modules inside it."""


def run_example(model: nn.Module, example: Any) -> None:
    """Run the model once in eval mode, without torch.compile, and leave it as it was.

    Gradients are on, because they tell a learned bias whose values are still zero from a mask. Nothing is saved for a
    backward pass. The example is as in `list_layers`; its tensors are converted to the device and the precision of the
    model's first floating-point parameter.

    Raises:
        ValueError: If the model does not take the example.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        example = tree_map_only(Tensor, partial(_converted, parameter), example)
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    try:
        with (
            evaluating(model),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            saved_tensors_hooks(lambda tensor: None, _never),
        ):
            model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"`example` must be an input of {type(model).__name__}: its forward failed with "
            f"{type(error).__name__}: {error}. Give a tuple of arguments, a dict, or the only argument."
        ) from error


def _never(nothing: None) -> Tensor:
    raise RuntimeError("a trial run is not differentiated")


def _converted(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Convert an input to the parameter's device and, if floating-point, to its precision, as trainers do."""
    return tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else tensor.dtype)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> TrialCall:
    """Describe a call of SDPA with these arguments."""
    causal = is_causal
    problem = _shape_problem(query, key, value)
    if problem is None and attn_mask is not None:
        if attn_mask.is_meta:
            problem = "its mask cannot be read on the meta device"
        elif is_bias(attn_mask):
            problem = BIAS
        else:
            causal = hides_future(attn_mask, query.shape[2], key.shape[2])
    heads = (query.shape[1], key.shape[1]) if query.dim() == key.dim() == 4 else (1, 1)
    return TrialCall(*heads, causal, problem)


def _shape_problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if query.is_nested:
        return "attends to nested tensors"
    if query.dim() != 4:
        return f"calls attention with {query.dim()} dimensions; 4 are needed: batch, heads, length, head_dim"
    if query.shape[2] != key.shape[2]:
        return f"cross-attention ({query.shape[2]} queries, {key.shape[2]} keys)"
    if key.shape[:3] != value.shape[:3]:
        return "its values have other heads or another length than its keys"
    if query.shape[1] % key.shape[1] or query.shape[0] != key.shape[0]:
        return "its keys are broadcast over samples or heads"
    return None
