"""The families of attention layers: their common protocol, and the list of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from sparse_prune.attention import hf, mha, sdpa
from sparse_prune.attention.handles import FoundLayer
from sparse_prune.attention.trial_run import TrialCalls


class Family(Protocol):
    """Attention layers that are reached in the same way. A module of this package that has these names is a family.

    `modules` are all modules of a model, by qualified name.
    """

    KIND: str
    """Its name in `FoundLayer.kind`."""

    def candidates(self, modules: Mapping[str, nn.Module]) -> Collection[str]:
        """Return the names of the modules that may be attention layers of this family."""

    def refused(self, name: str, module: nn.Module) -> str | None:
        """Return why a candidate cannot be pruned, whatever its arguments; None if no reason is known."""

    def observing(self, model: nn.Module) -> AbstractContextManager[TrialCalls]:
        """Record the attention calls of the family's modules inside the block, in which the model runs once.

        These modules become candidates too.
        """

    def find(
        self, modules: Mapping[str, nn.Module], names: Collection[str], calls: TrialCalls | None
    ) -> Iterator[FoundLayer]:
        """Describe layers by name, and why one cannot be pruned; without a trial run `calls` is None."""

    def attach(self, model: nn.Module, layers: list[FoundLayer]) -> None:
        """Route the calls of layers, which have handles, through these; some may be attached already."""

    def detach(self, model: nn.Module) -> None:
        """Undo `attach` for all layers of the family in any module."""


FAMILIES: list[Family] = [hf, mha, sdpa]
"""All families; a module belongs to the first one that claims it."""
