"""Wraps the training step of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from inspect import unwrap
from typing import Any

import pytorch_lightning as pl


class StandIn:
    """Stands in for a module's `training_step` until `remove`.

    Nothing else that runs the model calls it, such as another callback. A copied or unpickled module has its own step.

    Args:
        pl_module: The module.
        run: Called with the module's step and the arguments of the call; returns what the step returns.
    """

    def __init__(self, pl_module: pl.LightningModule, run: Callable[..., Any]) -> None:
        self._module, self._run, self._step = pl_module, run, pl_module.training_step
        self._own = vars(pl_module).get("training_step")  # what someone else has put on the instance
        update_wrapper(self, self._step, updated=())
        self.__wrapped__ = unwrap(self._step)  # Lightning looks at its signature, behind one wrapper at most
        vars(pl_module)["training_step"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._step, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "training_step")

    def remove(self) -> None:
        """Put the module's own step back."""
        vars(self._module).pop("training_step", None)
        if self._own is not None:
            vars(self._module)["training_step"] = self._own
