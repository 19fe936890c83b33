"""Handles on the attention layers of a model, and the description of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sparse_prune.attention.layer import PrunableAttention

_HANDLE = "_prunable_attention"


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """Describes an attention layer, and whether it can be pruned. None: not known."""

    name: str
    """Qualified name of the module in the model."""
    kind: str
    """Family: transformers' AttentionInterface ("transformers"), `nn.MultiheadAttention` ("mha"), a call of SDPA
    ("sdpa"), or none ("unknown")."""
    module: nn.Module = field(repr=False)
    """The module."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads."""
    causal: bool | None = None
    """Whether queries see only keys up to themselves."""
    window: int | None = None
    """Sliding window in tokens, the query's own included, if the model says so."""
    problem: str | None = None
    """Why the layer cannot be pruned; None: it can."""
    seen: bool = False
    """Whether a trial run has shown its calls. Otherwise the module's own claims hold until its first call."""


def handle_of(module: nn.Module) -> PrunableAttention | None:
    """Return the handle of an attention module (not of the model around it); None if it is not attached."""
    return vars(module).get(_HANDLE)


def handles_in(model: nn.Module) -> dict[str, PrunableAttention]:
    """Return the handles of all attached layers of a model, by the qualified names of their modules."""
    return {name: handle for name, m in modules_of(model).items() if (handle := handle_of(m)) is not None}


def give_handle(layer: FoundLayer) -> PrunableAttention:
    """Return the module's handle, made if it has none; it stays on the module until `drop_handle`."""
    handle = handle_of(layer.module)
    if handle is None:
        assert layer.num_heads is not None
        assert layer.num_kv_heads is not None
        handle = PrunableAttention(layer.name, layer.num_heads, layer.num_kv_heads, causal=bool(layer.causal))
        handle.seen = layer.seen
        handle.repeats_keys = layer.kind == "transformers"
        setattr(layer.module, _HANDLE, handle)
    return handle


def share_handle(own: nn.Module, copy: nn.Module) -> None:
    """Give a copy of an attached module, which may have copied the handle, its own handle: both are pruned as one."""
    handle, other = handle_of(own), handle_of(copy)
    assert handle is not None
    if other is not handle:
        handle.on_load += other.on_load if other is not None else ()
        setattr(copy, _HANDLE, handle)


def drop_handle(module: nn.Module) -> None:
    """Remove the module's handle, if it has one."""
    vars(module).pop(_HANDLE, None)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by qualified name, without the prefixes of torch.compile."""
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): m for name, m in model.named_modules()}


def holds(outer: str, inner: str) -> bool:
    """Whether one qualified name is the other or a parent of it; the empty name is the whole model."""
    return outer == inner or not outer or inner.startswith(f"{outer}.")
