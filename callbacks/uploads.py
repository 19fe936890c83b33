"""Runs work that may wait for a network in a thread beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

log = logging.getLogger(__name__)


class Uploads:
    """Runs actions one after the other in a thread; a receiver gets no more of them after its first failure.

    Submitted actions are finished before the process ends. A copy or unpickled instance starts empty.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_thread": None, "_pending": [], "_failed": self._failed.copy()}

    def submit(self, receiver: str, action: Callable[[], object]) -> None:
        """Run `action` soon; if it fails, a warning names `receiver`, which then gets no more actions."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sparse_prune-uploads")
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._thread.submit(self._run, receiver, action))

    def wait(self, seconds: float) -> None:
        """Wait until all actions are done or the time is up."""
        wait(self._pending, seconds)

    def _run(self, receiver: str, action: Callable[[], object]) -> None:
        if receiver in self._failed:
            return
        try:
            action()
        except Exception as error:  # a logger is foreign code on a network: no error of it may stop a run
            self._failed.add(receiver)
            log.warning("%s takes no files and gets no more of them; they lie beside the logs: %r", receiver, error)
