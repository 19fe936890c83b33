"""Logs the dense twin to the loggers of the pruned run, so that charts show both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.loggers import Logger
from typing_extensions import override

from sparse_prune.losses import TWIN


class TwinLogger(Logger):
    """Passes the metrics of the dense twin on to other loggers, under keys that begin with dense/.

    Args:
        loggers: Loggers of the pruned run, whose Trainer has finished.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        super().__init__()
        self._loggers = loggers

    @property
    @override
    def name(self) -> str:
        return "dense"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {TWIN + key: value for key, value in metrics.items() if key != "epoch"}
        for logger in self._loggers:
            logger.log_metrics(named, step=step)

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing, because the pruned run has logged the same."""

    @override
    def save(self) -> None:
        for logger in self._loggers:
            logger.save()
