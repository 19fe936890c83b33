"""Questions to the model of a run, at its first decisions, and what a user is told of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from sparse_prune.clock import now
from sparse_prune.distributed import on_first_rank, rank
from sparse_prune.pruner import AttentionPruner, Reduce
from sparse_prune.retrieval.asked_model import AskedModel
from sparse_prune.retrieval.probes import Ask
from sparse_prune.retrieval.settings import Retrieval

log = logging.getLogger(__name__)


class Questions:
    """Asks about several texts, and keeps whole heads beside those that the user protects.

    A decision asks about the texts of the calls before it, and later ones ask on until there were enough texts.

    Args:
        pruner: Its blocks get scores, and its constraints the heads.
        settings: What to ask; "auto": the default, where the model can be asked; None: nothing.

    Raises:
        TypeError: If `settings` is something else.
    """

    def __init__(self, pruner: AttentionPruner, settings: Retrieval | Literal["auto"] | None) -> None:
        if settings not in ("auto", None) and not isinstance(settings, Retrieval):
            raise TypeError(f"`retrieval` must be a Retrieval or None, got {settings!r}. Write Retrieval().")
        self.found: dict[str, tuple[int, ...]] = {}
        """Layer -> heads kept whole for retrieval."""
        self.unasked: str | None = None
        """Why a model could not be asked that "auto" would have asked."""
        self.seconds = 0.0
        """Time of asking in this process."""
        self._asked = 0  # texts, of all ranks
        self._pruner, self._auto = pruner, settings == "auto"
        self._settings = Retrieval() if settings == "auto" else settings
        self._own = pruner.constraints.protected_heads or {}
        self._model: AskedModel | None = None

    def begin(self, find: Callable[[Retrieval], nn.Module], questions: Ask) -> None:
        """Watch how training calls a model, until it was asked enough.

        Args:
            find: Finds what is called with tokens, or raises a ValueError.
            questions: As `AskedModel` takes them.
        """
        if self._settings is not None and self._left:
            with self._or_unasked():
                self._model = AskedModel(find(self._settings), self._pruner, self._settings, questions)

    @property
    def _left(self) -> int:
        """Texts to ask about."""
        return 0 if self._settings is None else max(0, self._settings.probes - self._asked)

    def end(self) -> None:
        """Watch no longer."""
        if self._model is not None:
            self._model.remove()
        self._model = None

    def put(
        self, device: torch.device, reduce: Reduce | None, context: AbstractContextManager[Any] | None = None
    ) -> None:
        """Ask about the texts since the last call, on all ranks, because they may share the model.

        Args:
            device: The model's.
            reduce: As `AttentionPruner.update` takes it.
            context: The model is called in it: autocast, say.
        """
        model, start = self._model, now(device)
        if model is None:
            return
        with self._or_unasked(), context or nullcontext():
            self._ask(model, reduce)
        if self.unasked or not self._left:
            self.end()
        self.seconds += now(device) - start

    def _ask(self, model: AskedModel, reduce: Reduce | None) -> None:
        """Ask about as many texts as rank 0 has, on each rank; of the heads that the first ones find, take rank 0's."""
        ranks = rank()[1]
        first, count = not self._asked, on_first_rank(lambda: min(model.count, -(-self._left // ranks)))
        if not count and not first:
            return
        found = model.ask(count, self._asked, reduce)
        self._asked += count * ranks
        if first and model.settings.heads:
            self._keep(on_first_rank(lambda: found))
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
        """What goes wrong with questions that nobody asked for stops no run; its closing summary tells of it."""
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


def outcome(pruner: AttentionPruner, unasked: str | None = None) -> str | None:
    """What a user is told of retrieval: what was kept for it, or what to do; None for models that do not write.

    Args:
        pruner: That of the run.
        unasked: Why the model was not asked.
    """
    if not pruner.total_sparsity or not all(state.layer.causal for state in pruner.layers.values()):
        return None
    kept = []
    if any(state.asked for state in pruner.layers.values()):
        kept.append("the blocks that the model looks at to answer questions")
    heads = sum(map(len, (pruner.constraints.protected_heads or {}).values()))
    if heads:
        kept.append(f"{heads} whole heads" if heads > 1 else "one whole head")
    if kept:
        return (
            f"Retrieval: pruning keeps {' and '.join(kept)}. A language model loses what it looks up long before its "
            "loss tells: `sparse-prune evaluate` measures both on an export."
        )
    if unasked:
        return (
            f"Retrieval: the model was not asked for what stands far back ({unasked}), and a language model loses "
            "what it looks up long before its loss tells (docs/retrieval.md)."
        )
    if pruner.score_used.sees == "gradient":
        remedy = "`retrieval=Retrieval(heads=0.05)` keeps whole heads"
    else:
        remedy = "`retrieval=Retrieval()` keeps what questions look at"
    return (
        "Retrieval: nothing was kept for it, and a language model loses what it looks up long before its loss tells. "
        f"{remedy} (docs/retrieval.md)."
    )
