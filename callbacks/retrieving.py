"""Finds the module of a LightningModule that can be asked, and what asks it."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
from torch import nn

from sparse_prune.attention.handles import holds
from sparse_prune.retrieval import Retrieval
from sparse_prune.retrieval.asked_model import named_module
from sparse_prune.retrieval.probes import Ask
from sparse_prune.retrieval.text_probes import questions_by


def questions_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Ask:
    """Return what asks: the module's `retrieval_probes`, else a `tokenizer` of it or of the data, else tokens alone."""
    own: Ask | None = getattr(pl_module, "retrieval_probes", None)
    owners = (pl_module, getattr(trainer, "datamodule", None))
    return own or questions_by(next(filter(None, (getattr(owner, "tokenizer", None) for owner in owners)), None))


def module_with_logits(pl_module: pl.LightningModule, layers: Iterable[str], settings: Retrieval) -> nn.Module:
    """Return the module that `Retrieval.module` names, or the only child that holds all attention layers.

    Raises:
        ValueError: If there is no such module, or not exactly one such child.
    """
    return named_module(pl_module, settings.module) if settings.module else _only_child(pl_module, list(layers))


def _only_child(pl_module: pl.LightningModule, layers: list[str]) -> nn.Module:
    children = dict(pl_module.named_children())
    holding = [child for name, child in children.items() if all(holds(name, layer) for layer in layers)]
    if len(holding) != 1:
        raise ValueError(
            f"`Retrieval.module` must be given for {type(pl_module).__name__}: none of its children {[*children]} "
            "holds all attention layers. Name the module that ends with the logits."
        )
    return holding[0]
