"""A format: files in which another program keeps which heads are full."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from torch import nn

from sparse_prune.export.heads import StreamingHeads
from sparse_prune.pattern import BlockPattern


class Format(ABC):
    """Files in which another program keeps which KV heads are full, and what sinks and window the others see.

    A subclass says how the heads stand in files; what heads can be said, and what not, is the same for all.
    """

    def write(self, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
        """Write the heads of a model.

        Args:
            model: A model with patterns.
            folder: Made if it is not there; files of the format in it are replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If a head sees neither everything nor sinks and a window, or if heads differ in what the format
                can say only once. The message names layer and head.
        """
        heads, target = StreamingHeads.of(model), Path(folder).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        self._write(heads, target)
        return target

    def read(
        self, folder: str | os.PathLike[str], model: nn.Module, *, length: int, block_size: int = 128
    ) -> dict[str, BlockPattern]:
        """Read heads as patterns, for `sparse_prune.attention.apply_patterns`.

        Args:
            folder: The folder that holds the files.
            model: The model that the heads are of.
            length: Tokens that the patterns cover; `BlockPattern.at` continues them.
            block_size: Tokens per block side; sinks and windows are rounded up to whole blocks.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is not of the format, or of a model with other heads.
        """
        target = Path(folder).expanduser()
        try:
            heads = self._read(target)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`folder` must hold files of {type(self).__name__}, got {os.fspath(folder)!r}: {error!r}. "
                "Name another folder."
            ) from error
        return heads.patterns(model, length, block_size)

    @abstractmethod
    def _write(self, heads: StreamingHeads, folder: Path) -> None: ...

    @abstractmethod
    def _read(self, folder: Path) -> StreamingHeads: ...
