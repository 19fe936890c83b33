"""Work that may wait for a network, done beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

log = logging.getLogger(__name__)


class Uploads:
    """Runs actions one after the other in a thread of its own; after the first failure it takes no more.

    What was submitted is finished before the process ends. A copy, or what a pickle gives back, has nothing to do.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_thread": None, "_pending": [], "_failed": self._failed.copy()}

    def submit(self, receiver: str, action: Callable[[], object]) -> None:
        """Run `action` soon; `receiver` is named if it fails, and then gets nothing any more."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sparse_prune-uploads")
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._thread.submit(self._run, receiver, action))

    def wait(self, seconds: float) -> None:
        """Until everything is done, or the time is up."""
        wait(self._pending, seconds)

    def _run(self, receiver: str, action: Callable[[], object]) -> None:
        if receiver in self._failed:
            return
        try:
            action()
        except Exception as error:  # a logger is any code, on any network: nothing it raises may stop a run
            self._failed.add(receiver)
            log.warning("%s takes no files and gets no more of them; they lie beside the logs: %r", receiver, error)
