"""Rows of a long measurement: kept as they come, so that what breaks off or fails takes no other row along."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparse_prune.files import whole_file

_T = TypeVar("_T")


class Rows:
    """What was measured so far, in a JSON file with the settings.

    Args:
        path: The file; rows that it has are taken over. None: nothing is kept.
        setup: Settings that all rows share.
        about: What is to stand beside them, but may differ from one command to the next.

    Raises:
        ValueError: If the file is of other settings.
    """

    def __init__(self, path: Path | None, setup: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        setup = json.loads(json.dumps(setup))
        saved = json.loads(path.read_text()) if path is not None and path.exists() else {"setup": setup, "rows": []}
        if any(saved["setup"].get(key, value) != value for key, value in setup.items()):
            raise ValueError(
                f"`--output` must be of the same settings, got {path} with {saved['setup']}. Name another."
            )
        self.path, self.setup = path, setup | (about or {})
        self.rows: list[dict[str, Any]] = saved["rows"]
        """All rows, the file's first."""
        self.failed: list[str] = []
        """Names of what failed."""

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep rows; the file is whole at any time."""
        self.rows += rows
        if self.path is None:
            return
        with whole_file(self.path) as file:
            file.write_text(json.dumps({"setup": self.setup, "rows": self.rows}, indent=1) + "\n")

    def attempt(self, name: str, run: Callable[[], _T]) -> _T | None:
        """What `run` gives; None, a printed line and the traceback if it fails, for want of memory say.

        Args:
            name: For the line, and for `finish`.
            run: Its failure is forgotten: a later command tries again.
        """
        try:
            return run()
        except Exception as error:
            print(f"{name}: failed: {type(error).__name__}: {str(error).partition(os.linesep)[0][:200]}", flush=True)
            traceback.print_exc()
            self.failed.append(name)
        # The error is gone, and with it the tensors of the frames that it held.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def finish(self) -> None:
        """End the command with status 1 and the names of what failed, if anything did."""
        if self.failed:
            raise SystemExit(f"Failed, to be tried again by the same command: {'; '.join(self.failed)}.")
