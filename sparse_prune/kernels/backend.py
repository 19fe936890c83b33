"""The record of a backend: how it computes attention, and its capabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

Attend = Callable[[Tensor, Tensor, Tensor, BlockPattern, AttentionOptions], Tensor]
"""Computes the output from query, key, value, pattern and options; shapes as in `reference.attend`."""


@dataclass(frozen=True, eq=False)
class HeldBlocks:
    """Says where key blocks stand in a tensor that holds those of all heads side by side."""

    place: Tensor
    """Number of each block among those held, int64, (num_kv_heads, kv_blocks), on the CPU; -1 if it was evicted."""

    def shown(self, everything: Tensor) -> Tensor:
        """View (batch, 1, slots, dim) as (batch, num_kv_heads, slots, dim): every head sees all slots."""
        return everything.expand(-1, len(self.place), -1, -1)


class Decode(Protocol):
    """Computes attention of the last few queries against a cache, without gradients."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions,
        held: HeldBlocks | None = None, kv_len: int | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Attend, as `triton.attend.decode` does, or return None to leave the call to a mask."""
        ...


_COUNT = count()
_NAMED: WeakValueDictionary[str, BlockPattern] = WeakValueDictionary()


def name_pattern(pattern: BlockPattern) -> str:
    """Give a pattern a new name for torch.compile, which recompiles when the name changes.

    The name is valid as long as the pattern lives.
    """
    name = str(next(_COUNT))
    _NAMED[name] = pattern
    return name


def named_pattern(name: str) -> BlockPattern:
    """Return the pattern, which must still live, that `name_pattern` gave a name."""
    return _NAMED[name]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention over the kept blocks of a pattern.

    A file in `sparse_prune/kernels/backends/` adds one by the name `BACKEND`. The file must be importable without
    optional packages; its functions import whatever takes long to import.
    """

    name: str
    """Its name in `backend=`."""
    attend: Attend
    """Computes a call."""
    skips_on: tuple[str, ...] = ()
    """Device types on which it skips pruned blocks, so that a measurement may choose it there."""
    rank: int = 100
    """Order in which backends are measured, and asked whether a moving pattern suits them, lowest first."""
    trains: Callable[[torch.device], bool] = lambda device: True
    """Whether it has gradients on a device."""
    usable: Callable[[], bool] = lambda: True
    """Whether this machine can run it; otherwise "gather" replaces it."""
    suits_moving: Callable[[Tensor, BlockPattern, AttentionOptions], bool] = lambda query, pattern, options: False
    """Whether to use it for a call (query, pattern, options) whose pattern still moves, so that its tables must be
    cheap to build. It must depend on the call alone, so that a repeated run does the same."""
    traced: Callable[[Tensor, Tensor, Tensor, str, bool, AttentionOptions], Tensor] | None = None
    """`attend` in a form that torch.compile can trace, of query, key, value, the name of a pattern (see
    `name_pattern`), its causality, and options. None: calls break the graph."""
    decode: Decode | None = None
    """Computes attention of the last few queries against a cache. None: a mask does it."""
    tune: Callable[[Tensor, Tensor, Tensor, BlockPattern, AttentionOptions, float], None] | None = None
    """Finds the fastest launch configurations of a call; the last argument is a limit in seconds. None: it has none."""
