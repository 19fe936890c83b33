"""Dropout that every backend can recompute for any subset of attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_AT_ONCE = 2**15  # numbers: few enough to stay in a core's cache


def draw_seed(dropout_p: float) -> int | None:
    """Draw the seed of a call's dropout from torch's generator; None without dropout, which draws nothing."""
    return int(torch.randint(2**62, ())) if dropout_p else None


def dropout_uniform(seed: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Draw uniform numbers in [0, 1) that depend only on the seed and on the weight's coordinates.

    Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed, with counter (key, query, head, 0); the first of
    the four outputs is used. Integers are kept in int64, whose products wrap modulo 2**64.

    `seed` lies in 0..2**63 - 1. `head`, the index batch * num_heads + head, and the positions `query` and `key` are
    int64 and broadcastable. The numbers are float32, of the broadcast shape.
    """
    shape = torch.broadcast_shapes(head.shape, query.shape, key.shape)  # type: ignore[no-untyped-call, unused-ignore]
    if head.device.type != "cpu" or not shape or shape.numel() <= _AT_ONCE:
        return _philox(seed, head, query, key).expand(shape)
    result = torch.empty(shape, dtype=torch.float32)
    parts = [part.view((1,) * (len(shape) - part.dim()) + part.shape) for part in (head, query, key)]
    step = max(1, _AT_ONCE * shape[0] // shape.numel())
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        result[rows] = _philox(seed, *(part if part.shape[0] == 1 else part[rows] for part in parts))
    return result


def _philox(seed: int, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Draw all numbers at once; the first rounds are computed before their inputs are broadcast."""
    c0, c1, c2, c3 = key & _LOW, query & _LOW, head & _LOW, torch.zeros_like(key)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((odd >> 32) & _LOW) ^ (c1 ^ k0), odd & _LOW, ((even >> 32) & _LOW) ^ (c3 ^ k1), even & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return (c0 >> 8).float() * 2.0**-24
