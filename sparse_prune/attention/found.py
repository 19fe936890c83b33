"""What was found out about an attention layer of a model, and the handle that it gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sparse_prune.attention.layer import PrunableAttention

_HANDLE = "_prunable_attention"


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """An attention layer, and whether its connections can be pruned. None stands for what is not known."""

    name: str
    """Qualified name of the module in the model."""
    kind: str
    """How it is reached: transformers' AttentionInterface ("transformers"), `nn.MultiheadAttention` ("mha"), a call of
    SDPA ("sdpa"), as another family says, or not at all ("unknown")."""
    module: nn.Module = field(repr=False)
    """The module itself."""
    num_heads: int | None = None
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads."""
    causal: bool | None = None
    """Whether queries see only keys up to themselves."""
    window: int | None = None
    """Tokens that a query sees back to, itself included, where the model says so."""
    problem: str | None = None
    """Why it cannot be pruned; None: it can."""
    seen: bool = False
    """Whether a trial run has shown its calls; else they are taken for what the module says, and the first decides."""


def handle_of(module: nn.Module) -> PrunableAttention | None:
    """The handle on an attention module, if it was taken over.

    Args:
        module: The attention module, not the model around it.
    """
    return vars(module).get(_HANDLE)


def give_handle(layer: FoundLayer) -> PrunableAttention:
    """The module's handle, which stays on it until `drop_handle`."""
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
    """Let a copy of an attached module have its handle: both are pruned as one.

    Args:
        own: The module.
        copy: Its copy, which may have a copy of the handle.
    """
    handle, other = handle_of(own), handle_of(copy)
    assert handle is not None
    if other is not handle:
        handle.on_load += other.on_load if other is not None else ()
        setattr(copy, _HANDLE, handle)


def drop_handle(module: nn.Module) -> None:
    """Forget the module's handle, if it has one."""
    vars(module).pop(_HANDLE, None)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by qualified name, as they are called without torch.compile."""
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): m for name, m in model.named_modules()}


def holds(outer: str, inner: str) -> bool:
    """Whether a module holds another, or is it, by their qualified names; the name of a whole model is empty."""
    return outer == inner or not outer or inner.startswith(f"{outer}.")
