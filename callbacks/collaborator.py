"""Callbacks that AttentionPruning calls, wherever they stand in a Trainer's list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import pytorch_lightning as pl
from typing_extensions import override

from sparse_prune.callbacks.lightning import Callback


class Driver(Callback):
    """The callback that calls collaborators: AttentionPruning."""


class Collaborator(Callback):
    """A callback that acts only when its driver calls it, even if a Trainer's list holds it too.

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
        """Reset the state of a run."""

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


_Kind = TypeVar("_Kind", bound=Collaborator)


def adopted(own: _Kind, given: bool, kind: type[_Kind], callbacks: Iterable[pl.Callback]) -> _Kind:
    """Return the collaborator of a kind in a Trainer's list, or else the driver's own.

    Args:
        own: The driver's collaborator.
        given: Whether the user gave it; otherwise it is a default, which one in the list replaces.
        kind: KernelSwap or SparsityLogger.
        callbacks: The Trainer's callbacks.

    Raises:
        ValueError: If there are several.
    """
    listed = [callback for callback in callbacks if isinstance(callback, kind) and callback is not own]
    count = len(listed) + given
    if count > 1:
        raise ValueError(
            f"A Trainer must hold one {kind.__name__}, got {count}, including that of AttentionPruning. "
            "Leave the others out."
        )
    return listed[0] if listed else own
