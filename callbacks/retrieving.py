"""Finds the heads that a LightningModule's language model looks things up with, and keeps them whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_prune.attention.handles import holds
from sparse_prune.export.sharded import is_sharded
from sparse_prune.pruner import AttentionPruner
from sparse_prune.retrieval import RetrievalHeads, far_field_influence, retrieval_probes, strongest_heads

log = logging.getLogger(__name__)


class WholeHeads:
    """Protects the heads that retrieval needs, found once per run, beside those that the user protects.

    Args:
        pruner: Its constraints get the heads.
        settings: How many heads to find, and by what; None: none.
    """

    def __init__(self, pruner: AttentionPruner, settings: RetrievalHeads | None) -> None:
        self.found: dict[str, tuple[int, ...]] = {}
        """Layer -> heads kept whole for retrieval."""
        self._pruner, self._settings = pruner, settings
        self._own = pruner.constraints.protected_heads or {}
        self._search: RetrievalSearch | None = None

    def begin_fit(self, pl_module: pl.LightningModule) -> None:
        """Watch how the training step calls the model, unless the heads are known."""
        if self._settings is not None and not self.found:
            self._search = RetrievalSearch(pl_module, self._pruner, self._settings)

    def end_fit(self) -> None:
        """Watch no longer."""
        if self._search is not None:
            self._search.remove()
        self._search = None

    def find(self, trainer: pl.Trainer) -> None:
        """Search the heads once, on all ranks, because they may share the model, and take rank 0's result."""
        search, self._search = self._search, None
        if search is None:
            return
        with trainer.precision_plugin.forward_context():
            self.keep(trainer.strategy.broadcast(search.find(), src=0))
        if not self.found:
            log.warning(
                "`retrieval` keeps no head whole, because the model answered none of its questions. Give the "
                "LightningModule a method `retrieval_probes(tokens, count, seed)` with questions that it can answer, "
                "such as `sparse_prune.retrieval.text_probes` with its tokenizer; or leave `retrieval` out."
            )
            return
        total = sum(state.layer.num_heads for state in self._pruner.layers.values())
        log.info(
            "%d of %d heads are kept whole for retrieval (`retrieval`).", sum(map(len, self.found.values())), total
        )

    def keep(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Protect heads that were found, in place of those found before."""
        self.found, own = dict(found), self._own
        heads = {name: tuple(sorted({*own.get(name, ()), *found.get(name, ())})) for name in {**own, **found}}
        self._pruner.constraints = replace(self._pruner.constraints, protected_heads=heads or None)


class RetrievalSearch:
    """Remembers how the training step calls the language model, until `remove`; then asks the model its own questions.

    They are what a method `retrieval_probes(tokens, count, seed)` of the LightningModule returns, if it has one: with a
    tokenizer, ask in words (`text_probes`). Else they are those of `sparse_prune.retrieval.retrieval_probes`.

    Args:
        pl_module: Its model was attached to the pruner.
        pruner: Its layers are searched.
        settings: How many heads to find, and by what.

    Raises:
        ValueError: If the module that gives the logits cannot be told, or FSDP2 keeps its weights in parts.
    """

    def __init__(self, pl_module: pl.LightningModule, pruner: AttentionPruner, settings: RetrievalHeads) -> None:
        self.pruner, self.settings = pruner, settings
        self._ask = getattr(pl_module, "retrieval_probes", retrieval_probes)
        self.module: nn.Module = _module_with_logits(pl_module, pruner.layers, settings.module)
        if is_sharded(self.module):
            raise ValueError(
                "`retrieval` needs the whole weights on every rank, and FSDP2 keeps them in parts. Find the heads in a "
                "run of one process and give them as Constraints(protected_heads=...)."
            )
        self._tokens: Tensor | None = None
        self._kwargs: dict[str, Any] = {}
        self._by_name = False
        self._hook = self.module.register_forward_pre_hook(self._remember, with_kwargs=True)

    def remove(self) -> None:
        """Look at no further call."""
        self._hook.remove()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and isinstance(tokens, Tensor) and tokens.dim() == 2 and _whole(tokens):
            self._tokens, self._by_name = tokens.detach(), "input_ids" in kwargs
            # What goes with the batch's tokens, masks and labels, does not go with others.
            self._kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}

    def find(self) -> dict[str, tuple[int, ...]]:
        """The heads, as `Constraints.protected_heads` takes them; by KV group if the constraints share them.

        Raises:
            ValueError: If no training step has called the module with tokens.
        """
        if self._tokens is None:
            raise ValueError(
                "`retrieval` needs a language model that `training_step` calls with tokens, int64, (batch, length), as "
                f"its first argument or as `input_ids`; {type(self.module).__name__} got none. Name another module by "
                "`RetrievalHeads.module`, or leave `retrieval` out."
            )
        self.remove()
        settings, shared = self.settings, self.pruner.constraints.share_kv_groups
        probes = self._ask(self._tokens[:, : settings.length].cpu(), settings.probes, settings.seed)
        layers = {name: state.layer for name, state in self.pruner.layers.items()}
        influence = far_field_influence(self.module, self._call, layers.values(), probes)
        groups = {name: layer.num_kv_heads for name, layer in layers.items()} if shared else None
        return strongest_heads(influence, settings.share, groups)

    def _call(self, tokens: Tensor) -> Tensor:
        assert self._tokens is not None
        tokens = tokens.to(self._tokens)
        return _logits_of(self.module(input_ids=tokens, **self._kwargs) if self._by_name else self.module(tokens))


def _whole(tokens: Tensor) -> bool:
    return not tokens.is_floating_point() and tokens.dtype != torch.bool


def _module_with_logits(pl_module: pl.LightningModule, layers: Iterable[str], wanted: str | None) -> nn.Module:
    """Return the module of that name, or the only child that holds all attention layers.

    Raises:
        ValueError: If there is no such module, or not exactly one such child.
    """
    modules: dict[str, nn.Module] = dict(pl_module.named_modules())
    children = [name for name, _ in pl_module.named_children()]
    if wanted is not None:
        if wanted not in modules:
            raise ValueError(
                f"`RetrievalHeads.module` must name a module of {type(pl_module).__name__}, got {wanted!r}. Its "
                f"children are {children}."
            )
        return modules[wanted]
    layers = list(layers)
    holding = [child for child in children if all(holds(child, layer) for layer in layers)]
    if len(holding) != 1:
        raise ValueError(
            f"`RetrievalHeads.module` must be given for {type(pl_module).__name__}: none of its children {children} "
            "holds all attention layers. Name the module that ends with the logits."
        )
    return modules[holding[0]]


def _logits_of(output: Any) -> Tensor:
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
