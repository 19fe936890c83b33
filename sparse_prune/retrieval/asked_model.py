"""A language model in training that is asked what stands far back in its texts."""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_prune.distributed import rank
from sparse_prune.pruner import AttentionPruner, Reduce
from sparse_prune.retrieval.heads import far_field_influence, strongest_heads
from sparse_prune.retrieval.probes import Ask
from sparse_prune.retrieval.repeats import repeat_passages
from sparse_prune.retrieval.settings import Retrieval
from sparse_prune.retrieval.watching import look_back
from sparse_prune.sharded import is_sharded

log = logging.getLogger(__name__)


class AskedModel:
    """Remembers the texts of training steps and how they call a language model, until `remove`; asks it about them.

    Beside the questions stand the texts with passages that repeat.

    Args:
        module: What training calls with tokens, and what returns logits, or something that has `logits`.
        pruner: It is attached to the module's layers.
        settings: What to ask, and what the answers decide.
        questions: Makes questions of texts.

    Raises:
        ValueError: If heads are to be found in weights that FSDP2 keeps in parts; or if none are to be found, and the
            pruner's score needs a backward pass, which questions do not have.
    """

    def __init__(self, module: nn.Module, pruner: AttentionPruner, settings: Retrieval, questions: Ask) -> None:
        if settings.heads and is_sharded(module):
            raise ValueError(
                f"`Retrieval.heads` must be 0 where FSDP2 keeps the weights in parts, got {settings.heads}. Find the "
                "heads in a run of one process and give them as Constraints(protected_heads=...)."
            )
        if pruner.score_used.sees == "gradient" and not settings.heads:
            raise ValueError(
                "`retrieval` scores blocks by a forward pass of its questions, but the pruner's score is "
                f"{pruner.score_used!r}, which needs a backward pass. Use a `statistic`, or a score of the forward "
                "pass; or keep whole heads with Retrieval(heads=0.05)."
            )
        self.module, self.pruner, self.settings = module, pruner, settings
        self._questions = questions
        self._texts = deque[Tensor](maxlen=settings.probes)  # the latest, all of one length
        self._kwargs: dict[str, Any] = {}
        self._by_name = False
        self._listen()

    @property
    def count(self) -> int:
        """Texts since the last questions, at most `Retrieval.probes`."""
        return len(self._texts)

    def _listen(self) -> None:
        self._hook = self.module.register_forward_pre_hook(self._remember, with_kwargs=True)

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
            count: Texts to ask about on each rank; if there are fewer, some twice.
            before: Texts that were asked about already, on all ranks. Heads are found with the first ones.
            reduce: As `AttentionPruner.update` takes it.

        Returns:
            The heads to keep whole, as `Constraints.protected_heads` takes them; by KV group if the constraints share
            them. None of them if the settings ask for none.

        Raises:
            ValueError: If no training step has called the module with tokens, or the model is not causal.
        """
        if not self._texts:
            raise ValueError(
                "`retrieval` needs a language model that training calls with tokens, int64, (batch, length), as its "
                f"first argument or as `input_ids`; {type(self.module).__name__} got none. Name another module by "
                "`Retrieval.module`, or leave `retrieval` out."
            )
        if not all(state.layer.causal for state in self.pruner.layers.values()):
            raise ValueError(
                "`retrieval` needs a causal language model, got one whose tokens see later ones. Leave it out."
            )
        # As many on every rank, whatever its batch holds.
        rows = torch.stack([self._texts[index % len(self._texts)] for index in range(count)])
        self._texts.clear()
        self.remove()
        try:
            with torch.compiler.set_stance("force_eager"):  # a few calls are not worth a compilation
                return self._found(rows[:, : self.settings.length], before, reduce)
        finally:
            self._listen()

    def _found(self, texts: Tensor, before: int, reduce: Reduce | None) -> dict[str, tuple[int, ...]]:
        if self.pruner.score_used.sees != "gradient":
            self._score_blocks(texts, self.settings.seed + before, reduce)
        elif not before:
            log.warning(
                "`retrieval` keeps whole heads and scores no block by its questions, because %r needs a backward pass. "
                "A `statistic`, or a score of the forward pass, would.",
                self.pruner.score_used,
            )
        return self._heads(texts) if self.settings.heads and not before else {}

    def _score_blocks(self, texts: Tensor, seed: int, reduce: Reduce | None) -> None:
        """Look back in questions on texts, and in texts whose passages repeat: on each rank in its share of them."""
        place, ranks = rank()
        shared = texts.cpu().repeat_interleave(ranks, 0)
        questions = self._questions(shared, len(shared), seed)[place::ranks]
        repeats = repeat_passages(shared, 1, seed)[place::ranks]
        pruner, call = self.pruner, partial(self._call, texts)
        layers, kind = [state.layer for state in pruner.layers.values()], pruner.score_used.kind
        for seen, topic in look_back(self.module, call, layers, questions, repeats, pruner.sides, kind):
            pruner.ask(seen if reduce is None else reduce(seen), topic)

    def _heads(self, texts: Tensor) -> dict[str, tuple[int, ...]]:
        probes = self._questions(texts.cpu(), self.settings.probes, self.settings.seed)
        layers = {name: state.layer for name, state in self.pruner.layers.items()}
        influence = far_field_influence(self.module, partial(self._call, texts), layers.values(), probes)
        shared = self.pruner.constraints.share_kv_groups
        groups = {name: layer.num_kv_heads for name, layer in layers.items()} if shared else None
        return strongest_heads(influence, self.settings.heads, groups)

    def _call(self, like: Tensor, tokens: Tensor) -> Tensor:
        """Call the module as training does, with tokens of the type and on the device of others."""
        tokens = tokens.to(like)
        return _logits_of(self.module(input_ids=tokens, **self._kwargs) if self._by_name else self.module(tokens))


def _whole(tokens: Tensor) -> bool:
    return not tokens.is_floating_point() and tokens.dtype != torch.bool


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


def named_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module that `Retrieval.module` names.

    Raises:
        ValueError: If there is none of that name.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise ValueError(
            f"`Retrieval.module` must name a module of {type(model).__name__}, got {name!r}. Its children are "
            f"{[child for child, _ in model.named_children()]}."
        )
    return modules[name]
