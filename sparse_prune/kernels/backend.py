"""What a backend is: one record of how it attends and what it can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparse_prune.kernels.held import HeldBlocks
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

Attend = Callable[[Tensor, Tensor, Tensor, BlockPattern, AttentionOptions], Tensor]
"""Query, key, value, pattern and options to the output; shapes as in `reference.attend`."""


class Decode(Protocol):
    """Attention of the last few queries against a cache, without gradients."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions,
        held: HeldBlocks | None = None, kv_len: int | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Attend, as `triton.attend.decode` says; None for a call that is left to a mask."""
        ...


_COUNT = count()
_NAMED: WeakValueDictionary[str, BlockPattern] = WeakValueDictionary()


def name_pattern(pattern: BlockPattern) -> str:
    """A new name for a pattern, by which torch.compile knows it: it compiles anew where the name changes.

    Args:
        pattern: The name holds as long as it lives.
    """
    name = str(next(_COUNT))
    _NAMED[name] = pattern
    return name


def named_pattern(name: str) -> BlockPattern:
    """The pattern that `name_pattern` gave a name.

    Args:
        name: Of a pattern that lives.
    """
    return _NAMED[name]


def _everywhere(device: torch.device) -> bool:
    return True


def _always() -> bool:
    return True


def _never(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> bool:
    return False


@dataclass(frozen=True)
class Backend:
    """A way to compute attention over the kept blocks of a pattern.

    A file in `sparse_prune/kernels/backends/` that holds one as `BACKEND` adds it. The file must import where an
    optional package is missing; what takes long to import is imported by the functions.
    """

    name: str
    """What `backend=` calls it."""
    attend: Attend
    """Computes a call."""
    skips_on: tuple[str, ...] = ()
    """Device types on which it skips pruned blocks, so that a measurement may choose it there."""
    rank: int = 100
    """Backends of a lower rank are measured first, and asked first whether a moving pattern suits them."""
    trains: Callable[[torch.device], bool] = _everywhere
    """Whether it has gradients on a device."""
    usable: Callable[[], bool] = _always
    """Whether this machine runs it; else "gather" stands in for it."""
    suits_moving: Callable[[Tensor, BlockPattern, AttentionOptions], bool] = _never
    """Whether it is the one for a call (query, pattern, options) whose pattern still moves: tables that are made anew
    must be cheap. It must follow from the call alone, so that a run that is repeated takes the same."""
    traced: Callable[[Tensor, Tensor, Tensor, str, bool, AttentionOptions], Tensor] | None = None
    """`attend` in a form that torch.compile can follow, for query, key, value, the name of a pattern (see
    `name_pattern`), whether it is causal, and options. None: calls break the graph."""
    decode: Decode | None = None
    """Attention of the last few queries against a cache. None: every such call is masked."""
    tune: Callable[[Tensor, Tensor, Tensor, BlockPattern, AttentionOptions], None] | None = None
    """Finds the fastest launch configurations of a call. None: there are none to find."""
