"""A W&B logger that goes offline without an account or a server, and logs each step once after a resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_utilities.core.imports import RequirementCache
from pytorch_lightning.loggers import WandbLogger
from typing_extensions import override

from sparse_prune.callbacks.lightning import logger_bases

log = logging.getLogger(__name__)
_CLIENT = RequirementCache("wandb>=0.30")  # the first that can be asked for an account without asking the user for one


class FallbackWandbLogger(WandbLogger, *logger_bases()):  # type: ignore[misc]
    """A `WandbLogger` that goes offline rather than stop a run, ask a question, or wait without end.

    Without a configured account, or if the server does not answer or refuses, the run is kept on disk, and `wandb sync`
    uploads it later. `WANDB_MODE` and `offline=True` take precedence. A server that fails during the run slows nothing;
    W&B's client reports it at the end.

    A run that is resumed from a checkpoint under its old `id` repeats the steps after the checkpoint; those that the
    server already has are not sent again.

    Args:
        *args: As for `WandbLogger`.
        init_timeout: Seconds to wait for the server at the start.
        finish_timeout: Seconds to wait for uploads at the end; what is left stays on disk.
        **kwargs: As for `WandbLogger`; None is the same as leaving it out. `settings` replaces the two timeouts.

    Raises:
        ModuleNotFoundError: If W&B's client is missing or older than 0.30.
        ValueError: If a timeout is not positive.
    """

    def __init__(self, *args: Any, init_timeout: float = 30.0, finish_timeout: float = 120.0, **kwargs: Any) -> None:
        if not _CLIENT:
            raise ModuleNotFoundError(f"FallbackWandbLogger needs the client of W&B: {_CLIENT}.")
        for name, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            if not seconds > 0:
                raise ValueError(f"`{name}` must be a positive number of seconds, got {seconds}.")
        # A configuration file passes all known keywords, as None unless it sets them.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        super().__init__(*args, **kwargs)
        if self._wandb_init.get("anonymous") is None:  # the client warns of any value
            self._wandb_init.pop("anonymous", None)
        import wandb

        timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        self._wandb_init.setdefault("settings", wandb.Settings(**timeouts))
        self._resumed_at = -1  # last step that the server had when the run was resumed

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        if not (self._offline or "WANDB_MODE" in os.environ or "mode" in self._wandb_init or _has_account()):
            self._go_offline("No W&B account is configured")
        try:
            run = super().experiment
        except Exception as error:  # the client has many kinds of errors
            if self._wandb_init.get("mode") == "offline":
                raise
            self._go_offline(f"W&B cannot be reached ({str(error).splitlines()[0]})")
            run = super().experiment
        if getattr(run, "resumed", False):
            self._resumed_at = int(run.summary.get("trainer/global_step", -1))
        return run

    def _go_offline(self, reason: str) -> None:
        self._wandb_init["mode"] = "offline"
        folder = os.path.join(self._wandb_init.get("dir") or ".", "wandb")
        log.warning("%s: the run is kept in %s. `wandb sync` uploads it later.", reason, folder)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        run = self.experiment
        if step is not None and step <= self._resumed_at:
            if step < self._resumed_at:
                return
            # The last step of the old run may have been logged in part.
            metrics = {key: value for key, value in metrics.items() if _last(run.summary.get(key)) != value}
            if not metrics:
                return
        super().log_metrics(metrics, step)


def _last(summary: Any) -> Any:
    """Return the last value of a summary, which may hold a minimum or a mean as well."""
    return summary.get("last") if hasattr(summary, "get") else summary


def _has_account() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
