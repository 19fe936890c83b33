"""The families of attention layers: what each must say, and the list of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from sparse_prune.attention import hf, mha, sdpa
from sparse_prune.attention.found import FoundLayer
from sparse_prune.attention.trial import Calls


class Family(Protocol):
    """Layers that are reached in one way. A module of this package that holds these names is one."""

    KIND: str
    """What `FoundLayer.kind` calls it."""

    def candidates(self, modules: Mapping[str, nn.Module]) -> Collection[str]:
        """Names of the modules that may be attention layers of this family.

        Args:
            modules: All of a model's, by qualified name.
        """

    def refused(self, name: str, module: nn.Module) -> str | None:
        """Why a candidate cannot be pruned whatever it is called with; None: nothing is known against it.

        Args:
            name: Qualified name.
            module: The candidate.
        """

    def observing(self, model: nn.Module) -> AbstractContextManager[Calls]:
        """Inside, the attention calls of the family's modules are noted. Those that are noted are candidates too.

        Args:
            model: It runs once inside.
        """

    def find(
        self, modules: Mapping[str, nn.Module], names: Collection[str], calls: Calls | None
    ) -> Iterator[FoundLayer]:
        """What is known about layers: heads, causality, and why one cannot be pruned.

        Args:
            modules: All of a model's, by qualified name.
            names: The layers.
            calls: What a trial run has shown; None: there was none.
        """

    def attach(self, model: nn.Module, layers: list[FoundLayer]) -> None:
        """Let the calls of layers go to their handles.

        Args:
            model: The model around them.
            layers: They have handles. Some may be attached already.
        """

    def detach(self, model: nn.Module) -> None:
        """Give the family's modules their own attention back.

        Args:
            model: Whether any of its layers was attached or not.
        """


FAMILIES: list[Family] = [hf, mha, sdpa]
"""A module belongs to the first of them that claims it."""
