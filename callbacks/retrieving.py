"""Asks a LightningModule's language model what stands far back in its text, and keeps what it looks at."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_prune.attention.handles import holds
from sparse_prune.clock import now
from sparse_prune.export.sharded import is_sharded
from sparse_prune.pruner import AttentionPruner, Reduce
from sparse_prune.retrieval import (
    Retrieval,
    far_field_influence,
    look_back,
    retrieval_probes,
    strongest_heads,
)

log = logging.getLogger(__name__)


class Questions:
    """Asks about several texts, and keeps whole heads beside those that the user protects.

    A decision asks about the texts of the calls before it, and later ones ask on until there were enough texts.

    Args:
        pruner: Its blocks get scores, and its constraints the heads.
        settings: What to ask; "auto": the default, where the model can be asked; None: nothing.
    """

    def __init__(self, pruner: AttentionPruner, settings: Retrieval | Literal["auto"] | None) -> None:
        self.found: dict[str, tuple[int, ...]] = {}
        """Layer -> heads kept whole for retrieval."""
        self.unasked: str | None = None
        """Why a model could not be asked that "auto" would have asked."""
        self.seconds = 0.0
        """Time of asking in this process."""
        self._asked = 0  # texts, on each rank
        self._pruner, self._auto = pruner, settings == "auto"
        self._settings = Retrieval() if settings == "auto" else settings
        self._own = pruner.constraints.protected_heads or {}
        self._model: AskedModel | None = None

    def begin_fit(self, pl_module: pl.LightningModule) -> None:
        """Watch how the training step calls the model, until it was asked enough."""
        if self._settings is not None and self._left:
            with self._or_unasked():
                self._model = AskedModel(pl_module, self._pruner, self._settings)

    @property
    def _left(self) -> int:
        """Texts to ask about."""
        return 0 if self._settings is None else self._settings.probes - self._asked

    def end_fit(self) -> None:
        """Watch no longer."""
        if self._model is not None:
            self._model.remove()
        self._model = None

    def put(self, trainer: pl.Trainer, reduce: Reduce | None) -> None:
        """Ask about the texts since the last call, on all ranks, because they may share the model."""
        model, device = self._model, trainer.strategy.root_device
        if model is None:
            return
        start = now(device)
        with self._or_unasked(), trainer.precision_plugin.forward_context():
            self._ask(model, trainer, reduce)
        if self.unasked or not self._left:
            self.end_fit()
        self.seconds += now(device) - start

    def _ask(self, model: AskedModel, trainer: pl.Trainer, reduce: Reduce | None) -> None:
        """Ask about as many texts as rank 0 has; of the heads, which are sought at first, take those of rank 0."""
        share = trainer.strategy.broadcast
        first, count = not self._asked, share(min(model.count, self._left), src=0)
        if not count and not first:
            return
        found = model.ask(count, self._asked, reduce)
        self._asked += count
        if first and model.settings.heads:
            self._keep(share(found, src=0))
            self._tell()

    def _tell(self) -> None:
        """Say which heads were found."""
        if self.found:
            total = sum(state.layer.num_heads for state in self._pruner.layers.values())
            log.info(
                "%d of %d heads are kept whole for retrieval (`retrieval`).", sum(map(len, self.found.values())), total
            )
        else:
            log.warning(
                "`retrieval` keeps no head whole, because the model answered none of its questions. Give the "
                "LightningModule a method `retrieval_probes(tokens, count, seed)` with questions that it can answer, "
                "such as `sparse_prune.retrieval.text_probes` with its tokenizer; or leave `heads` out."
            )

    @contextmanager
    def _or_unasked(self) -> Iterator[None]:
        """What goes wrong with questions that nobody asked for stops no run: its last word tells."""
        try:
            yield
        except Exception as problem:
            if not self._auto:
                raise
            self.unasked = f"{type(problem).__name__}: {problem}"

    def _keep(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Protect heads that were found, in place of those found before."""
        self.found, own = dict(found), self._own
        heads = {name: tuple(sorted({*own.get(name, ()), *found.get(name, ())})) for name in {**own, **found}}
        self._pruner.constraints = replace(self._pruner.constraints, protected_heads=heads or None)

    def forget_run(self) -> None:
        """Reset what belongs to a run."""
        self._asked, self.unasked = 0, None
        self._keep({})

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"retrieval_asked": self._asked, "retrieval_heads": self.found}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; older state has less."""
        self._keep(state.get("retrieval_heads", {}))
        asked = state.get("retrieval_asked", bool(self.found))
        # Older state says only whether all was asked.
        self._asked = self._left if asked is True else int(asked)


class AskedModel:
    """Remembers the texts of training steps and how they call the language model, until `remove`; asks it about them.

    The questions are what a method `retrieval_probes(tokens, count, seed)` of the LightningModule returns, if it has
    one: with a tokenizer, ask in words (`text_probes`). Else they are those of
    `sparse_prune.retrieval.retrieval_probes`. Beside them stand the texts with passages that repeat.

    Args:
        pl_module: Its model was attached to the pruner.
        pruner: Its layers are looked at.
        settings: What to ask, and what the answers decide.

    Raises:
        ValueError: If the module that gives the logits cannot be told, or heads are to be found in weights that FSDP2
            keeps in parts.
    """

    def __init__(self, pl_module: pl.LightningModule, pruner: AttentionPruner, settings: Retrieval) -> None:
        self.pruner, self.settings = pruner, settings
        self._ask = getattr(pl_module, "retrieval_probes", retrieval_probes)
        self.module: nn.Module = _module_with_logits(pl_module, pruner.layers, settings.module)
        if settings.heads and is_sharded(self.module):
            raise ValueError(
                f"`Retrieval.heads` must be 0 where FSDP2 keeps the weights in parts, got {settings.heads}. Find the "
                "heads in a run of one process and give them as Constraints(protected_heads=...)."
            )
        self._texts = deque[Tensor](maxlen=settings.probes)  # the latest, all of one length
        self._kwargs: dict[str, Any] = {}
        self._by_name = False
        self._hook = self.module.register_forward_pre_hook(self._remember, with_kwargs=True)

    @property
    def count(self) -> int:
        """Texts since the last questions, at most `Retrieval.probes`."""
        return len(self._texts)

    def remove(self) -> None:
        """Look at no further call."""
        self._hook.remove()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled() and isinstance(tokens, Tensor) and tokens.dim() == 2 and _whole(tokens):
            if self._texts and len(self._texts[-1]) != tokens.shape[1]:
                self._texts.clear()
            self._texts.extend(tokens.detach())
            self._by_name = "input_ids" in kwargs
            # What goes with the batch's tokens, masks and labels, does not go with others.
            self._kwargs = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}

    def ask(self, count: int, before: int = 0, reduce: Reduce | None = None) -> dict[str, tuple[int, ...]]:
        """Score blocks by what the model looks at to answer, and find the heads that its answers hang on.

        Args:
            count: Texts to ask about; if there are fewer, some twice.
            before: Texts that were asked about already. Heads are found with the first ones.
            reduce: As `AttentionPruner.update` takes it.

        Returns:
            The heads to keep whole, as `Constraints.protected_heads` takes them; by KV group if the constraints share
            them. None of them if the settings ask for none.

        Raises:
            ValueError: If no training step has called the module with tokens, or the model is not causal.
        """
        if not self._texts:
            raise ValueError(
                "`retrieval` needs a language model that `training_step` calls with tokens, int64, (batch, length), as "
                f"its first argument or as `input_ids`; {type(self.module).__name__} got none. Name another module by "
                "`Retrieval.module`, or leave `retrieval` out."
            )
        if not all(state.layer.causal for state in self.pruner.layers.values()):
            raise ValueError(
                "`retrieval` needs a causal language model, got one whose tokens see later ones. Leave it out."
            )
        settings, seed = self.settings, self.settings.seed + before
        # As many on every rank, whatever its batch holds.
        rows = [self._texts[index % len(self._texts)] for index in range(count)]
        texts = torch.stack(rows)[:, : settings.length].cpu()
        with torch.compiler.set_stance("force_eager"):  # a few calls are not worth a compilation
            if self.pruner.score_used.sees != "gradient":
                self._score_blocks(texts, seed, reduce)
            elif not before:
                log.warning(
                    "`retrieval` scores no block by its questions, because %r needs a backward pass. Use a `statistic` "
                    "of attention, or a score of the forward pass.",
                    self.pruner.score_used,
                )
            found = self._heads(texts) if settings.heads and not before else {}
        self._texts.clear()  # those of the questions, too
        return found

    def _score_blocks(self, texts: Tensor, seed: int, reduce: Reduce | None) -> None:
        """Look back in questions on texts, and in texts whose passages repeat."""
        pruner, questions = self.pruner, self._ask(texts, len(texts), seed)
        layers, kind = [state.layer for state in pruner.layers.values()], pruner.score_used.kind
        for seen, topic in look_back(self.module, self._call, layers, questions, texts, pruner.sides, kind, seed):
            pruner.ask(seen if reduce is None else reduce(seen), topic)

    def _heads(self, texts: Tensor) -> dict[str, tuple[int, ...]]:
        probes = self._ask(texts, self.settings.probes, self.settings.seed)
        layers = {name: state.layer for name, state in self.pruner.layers.items()}
        influence = far_field_influence(self.module, self._call, layers.values(), probes)
        shared = self.pruner.constraints.share_kv_groups
        groups = {name: layer.num_kv_heads for name, layer in layers.items()} if shared else None
        return strongest_heads(influence, self.settings.heads, groups)

    def _call(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self._texts[-1])
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
                f"`Retrieval.module` must name a module of {type(pl_module).__name__}, got {wanted!r}. Its "
                f"children are {children}."
            )
        return modules[wanted]
    layers = list(layers)
    holding = [child for child in children if all(holds(child, layer) for layer in layers)]
    if len(holding) != 1:
        raise ValueError(
            f"`Retrieval.module` must be given for {type(pl_module).__name__}: none of its children {children} "
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
