"""Finds the part of a LightningModule that returns the logits, and the logits in its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from sparse_prune.attention.handles import holds


def module_with_logits(
    pl_module: pl.LightningModule, layers: Iterable[str], wanted: str | None, argument: str
) -> nn.Module:
    """Return the module of that name, or the only child that holds all attention layers.

    Args:
        pl_module: A module of either package.
        layers: Qualified names of the attention layers.
        wanted: Qualified name; None: the child.
        argument: The name of `wanted` in errors.

    Raises:
        ValueError: If there is no such module, or not exactly one such child.
    """
    modules: dict[str, nn.Module] = dict(pl_module.named_modules())
    children = [name for name, _ in pl_module.named_children()]
    if wanted is not None:
        if wanted not in modules:
            raise ValueError(
                f"`{argument}` must name a module of {type(pl_module).__name__}, got {wanted!r}. Its children are "
                f"{children}."
            )
        return modules[wanted]
    layers = list(layers)
    holding = [child for child in children if all(holds(child, layer) for layer in layers)]
    if len(holding) != 1:
        raise ValueError(
            f"`{argument}` must be given for {type(pl_module).__name__}: none of its children {children} holds all "
            "attention layers. Name the module that ends with the logits."
        )
    return modules[holding[0]]


def logits_of(output: Any) -> Tensor:
    """A module's logits: its output, or what that has under this name.

    Raises:
        ValueError: If there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "`module` must name a module whose output is a tensor of logits or has `logits`, got "
            f"{type(output).__name__}. Name the module that ends with the classes."
        )
    return logits
