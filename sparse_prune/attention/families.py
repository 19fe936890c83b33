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
    """Attention layers that are reached in the same way. A module of this package that has these names is a family."""

    KIND: str
    """Its name in `FoundLayer.kind`."""

    def candidates(self, modules: Mapping[str, nn.Module]) -> Collection[str]:
        """Return the names of the modules that may be attention layers of this family.

        Args:
            modules: All modules of a model, by qualified name.
        """

    def refused(self, name: str, module: nn.Module) -> str | None:
        """Return why a candidate cannot be pruned, whatever its arguments; None if no reason is known.

        Args:
            name: Qualified name.
            module: The candidate.
        """

    def observing(self, model: nn.Module) -> AbstractContextManager[TrialCalls]:
        """Record the attention calls of the family's modules inside the block. These modules become candidates too.

        Args:
            model: The model, which runs once inside.
        """

    def find(
        self, modules: Mapping[str, nn.Module], names: Collection[str], calls: TrialCalls | None
    ) -> Iterator[FoundLayer]:
        """Describe layers: heads, causality, and why one cannot be pruned.

        Args:
            modules: All modules of a model, by qualified name.
            names: Names of the layers.
            calls: The calls of a trial run; None if there was none.
        """

    def attach(self, model: nn.Module, layers: list[FoundLayer]) -> None:
        """Route the calls of layers through their handles.

        Args:
            model: The model that holds them.
            layers: Layers with handles; some may be attached already.
        """

    def detach(self, model: nn.Module) -> None:
        """Undo `attach` for all layers of the family.

        Args:
            model: Any module, attached or not.
        """


FAMILIES: list[Family] = [hf, mha, sdpa]
"""All families; a module belongs to the first one that claims it."""
