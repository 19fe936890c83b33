"""What is derived from a pattern and kept, for as long as the pattern lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TypeVar
from weakref import WeakKeyDictionary, proxy

import torch

from sparse_prune.pattern import BlockPattern

_T = TypeVar("_T")
_LENGTHS_KEPT = 8
_KEPT: WeakKeyDictionary[object, dict[Hashable, tuple[object, Hashable]]] = WeakKeyDictionary()


def derived(
    owner: object,
    key: tuple[Hashable, ...],
    make: Callable[[], _T],
    state: Callable[[], Hashable] = lambda: None,
) -> _T:
    """What `make` gives, made once per owner and key, and dropped with the owner.

    It is made outside of inference mode: autograd cannot save for training what validation built inside it.

    Args:
        owner: What it is derived from: a pattern, or what a cache holds. What `make` gives must not hold it, or neither
            would ever be dropped.
        key: Who asks, and all else that it is derived from.
        make: Derives it.
        state: Tells what else it is derived from that changes with time. In another state it is made anew, and what was
            made before goes.
    """
    known = _KEPT.setdefault(owner, {})
    found = known.get(key)
    if found is None or found[1] != state():
        with torch.inference_mode(False):
            known[key] = found = (make(), state())  # making it may have changed the state, as reading a file does
    return found[0]  # type: ignore[return-value]


def at_lengths(pattern: BlockPattern, q_len: int, kv_len: int) -> BlockPattern:
    """`pattern.at`, kept for the next call; only the latest lengths are.

    Args:
        pattern: Any.
        q_len: Query tokens.
        kv_len: Key tokens.
    """
    if (q_len, kv_len) == (pattern.q_len, pattern.kv_len):
        return pattern
    itself: BlockPattern = proxy(pattern)  # what is kept must not hold it
    at = derived(pattern, ("lengths",), lambda: lru_cache(_LENGTHS_KEPT)(lambda *lengths: itself.at(*lengths)))
    return at(q_len, kv_len)
