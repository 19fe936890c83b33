"""Callbacks that AttentionPruning drives, wherever a Trainer's list holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytorch_lightning as pl
from typing_extensions import override

from sparse_prune.callbacks.lightning import Callback


class Driver(Callback):
    """What AttentionPruning is to its collaborators."""


class Collaborator(Callback):
    """It acts when its driver calls it. It has no hooks that act, so nothing happens twice if a Trainer holds it too.

    Its state is part of the driver's.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(callback, Driver) for callback in callbacks):
            raise ValueError(
                f"`Trainer(callbacks=...)` must hold an AttentionPruning beside {type(self).__name__}, got none. Write "
                "AttentionPruning(..., swap=KernelSwap(), logging=SparsityLogger())."
            )

    def forget_run(self) -> None:
        """A new run begins."""

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""


_Kind = TypeVar("_Kind", bound=Collaborator)


def adopted(own: _Kind, given: bool, kind: type[_Kind], callbacks: Iterable[pl.Callback]) -> _Kind:
    """The collaborator of a kind that a Trainer's list holds, else the driver's own.

    Args:
        own: The driver's.
        given: Whether the user gave it; else it is a default that steps back.
        kind: KernelSwap or SparsityLogger.
        callbacks: The Trainer's.

    Raises:
        ValueError: If there are several.
    """
    listed = [callback for callback in callbacks if isinstance(callback, kind) and callback is not own]
    count = len(listed) + given
    if count > 1:
        raise ValueError(
            f"A Trainer must hold one {kind.__name__}, got {count}, those that AttentionPruning was given included. "
            "Leave the others out."
        )
    return listed[0] if listed else own
