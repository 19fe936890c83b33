"""Keeps what is derived from a pattern or a mask for as long as the pattern or the mask lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TypeVar
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_prune.pattern import BlockPattern

_T = TypeVar("_T")
_LENGTHS_KEPT = 8
_KEPT: WeakKeyDictionary[object, dict[Hashable, tuple[object, Hashable]]] = WeakKeyDictionary()

_KEPT_BY_TENSOR = WeakTensorKeyDictionary()


def derived(
    owner: object,
    key: tuple[Hashable, ...],
    make: Callable[[], _T],
    state: Callable[[], Hashable] = lambda: None,
) -> _T:
    """Return the result of `make`, called once per owner (a pattern, say) and key; it is dropped with the owner.

    `make` runs outside of inference mode, because training cannot use what validation made inside it. Its result must
    not hold the owner, or neither would ever be dropped. When `state` changes, it is called again.
    """
    known = _KEPT.setdefault(owner, {})
    found = known.get(key)
    if found is None or found[1] != state():
        with torch.inference_mode(False):
            known[key] = found = (make(), state())  # making it may have changed the state, as reading a file does
    return found[0]  # type: ignore[return-value]


def of_tensor(tensor: Tensor, key: Hashable, make: Callable[[], _T]) -> _T:
    """Return the result of `make`, called once per tensor and key: the layers of a forward pass share their masks.

    After a write into the tensor it is called again. Nothing is kept under a tracer, nor for inference tensors, which
    do not count writes. As with `derived`, the result must not hold the tensor.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return make()
    known: dict[Hashable, tuple[int, _T]] = _KEPT_BY_TENSOR.setdefault(tensor, {})  # type: ignore[no-untyped-call, unused-ignore]
    if key not in known or known[key][0] != tensor._version:
        known[key] = (tensor._version, make())
    return known[key][1]


def at_lengths(pattern: BlockPattern, q_len: int, kv_len: int) -> BlockPattern:
    """Return `pattern.at(q_len, kv_len)`; the results for the latest lengths are kept."""
    if (q_len, kv_len) == (pattern.q_len, pattern.kv_len):
        return pattern
    itself: BlockPattern = proxy(pattern)  # what is kept must not hold it
    at = derived(pattern, ("lengths",), lambda: lru_cache(_LENGTHS_KEPT)(lambda *lengths: itself.at(*lengths)))
    return at(q_len, kv_len)
