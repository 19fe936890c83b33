"""What is derived from a pattern or a mask and kept, for as long as that lives."""

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
    """Return what `make` gives, made once per owner (a pattern, say) and key, and dropped with the owner.

    It is made outside of inference mode: autograd cannot save for training what validation built inside it. It must not
    hold the owner, or neither would ever be dropped. In another `state` it is made anew, and what was made before goes.
    """
    known = _KEPT.setdefault(owner, {})
    found = known.get(key)
    if found is None or found[1] != state():
        with torch.inference_mode(False):
            known[key] = found = (make(), state())  # making it may have changed the state, as reading a file does
    return found[0]  # type: ignore[return-value]


def of_tensor(tensor: Tensor, key: Hashable, make: Callable[[], _T]) -> _T:
    """Return what `make` gives, made once per tensor and key: the layers of a forward pass share their masks.

    After a write into the tensor it is made anew. A tracer keeps nothing, nor does inference mode, which does not count
    writes. As with `derived`, what is made must not hold the tensor.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return make()
    known: dict[Hashable, tuple[int, _T]] = _KEPT_BY_TENSOR.setdefault(tensor, {})  # type: ignore[no-untyped-call, unused-ignore]
    if key not in known or known[key][0] != tensor._version:
        known[key] = (tensor._version, make())
    return known[key][1]


def at_lengths(pattern: BlockPattern, q_len: int, kv_len: int) -> BlockPattern:
    """Return `pattern.at(q_len, kv_len)`, kept for the next call; only the latest lengths are."""
    if (q_len, kv_len) == (pattern.q_len, pattern.kv_len):
        return pattern
    itself: BlockPattern = proxy(pattern)  # what is kept must not hold it
    at = derived(pattern, ("lengths",), lambda: lru_cache(_LENGTHS_KEPT)(lambda *lengths: itself.at(*lengths)))
    return at(q_len, kv_len)
