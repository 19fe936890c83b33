"""Patterns that are fixed in advance: published ones, which learned patterns have to beat, and random ones to time.

Each published kind is an order in which a query block takes key blocks; `fixed_pattern` cuts the order where the wanted
density is reached, so that all kinds are compared at equal density.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sparse_prune.pattern import BlockPattern

FixedKind = Literal["sink_and_window", "bigbird", "longformer_dilated", "strided"]
_LAST = 1e6  # after all blocks that the kind takes by itself


def fixed_pattern(
    kind: FixedKind,
    num_heads: int,
    length: int,
    block_size: int,
    *,
    density: float,
    causal: bool = True,
    seed: int = 0,
) -> BlockPattern:
    """Make a pattern of a published kind that keeps `density` of the possible blocks of every head.

    Args:
        kind: "sink_and_window": first block and a window (StreamingLLM, arXiv:2309.17453). "bigbird": window, global
            and random blocks, 3 : 2 : 3 (arXiv:2007.14062). "longformer_dilated": global block and a window, dilated by
            two in every other head (arXiv:2004.05150). "strided": a window and every n-th block, n the root of the
            number of blocks (Sparse Transformer, arXiv:1904.10509).
        num_heads: Query heads.
        length: Tokens.
        block_size: Tokens per block side.
        density: Share of the possible blocks to keep, in (0, 1]. The diagonal is kept in any case.
        causal: Whether queries see only keys up to themselves.
        seed: Seed of BigBird's random blocks.

    Raises:
        ValueError: If `density` is out of range or there is no such kind.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"`density` must lie in (0, 1], got {density}.")
    if kind not in _ORDERS:
        raise ValueError(f"`kind` must be one of {sorted(_ORDERS)}, got {kind!r}.")
    dense = BlockPattern.dense(num_heads, length, length, block_size, causal)
    rows = dense.keep.shape[1]
    place = torch.arange(rows)
    distance = (place[:, None] - place).abs().float()
    order = _ORDERS[kind](distance, num_heads, torch.Generator().manual_seed(seed))
    order = order.masked_fill(distance == 0, -1.0)
    return BlockPattern(_first(order, dense.possible, density), (block_size, block_size), causal, length, length)


def random_pattern(
    num_heads: int,
    length: int,
    block_size: int | tuple[int, int],
    *,
    density: float,
    causal: bool = True,
    seed: int = 0,
) -> BlockPattern:
    """Make a pattern to measure time with: the first key block, the diagonal, and random others.

    Args:
        num_heads: Query heads; they differ in what they keep, and in how much.
        length: Tokens.
        block_size: Tokens per block, (query, key); one number for both sides.
        density: Share of the possible blocks of all heads to keep, in [0, 1]. Sink and diagonal are kept in any case,
            which may be more than a low density allows.
        causal: Whether queries see only keys up to themselves.
        seed: Seed of the random blocks.

    Raises:
        ValueError: If `density` is out of range.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"`density` must lie in [0, 1], got {density}.")
    dense = BlockPattern.dense(num_heads, length, length, block_size, causal)
    block_q, block_kv = dense.block_size
    rows = torch.arange(dense.keep.shape[1])
    order = torch.rand(dense.keep.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
    order[:, :, 0] = 2.0
    order[:, rows, rows * block_q // block_kv] = 2.0
    order = order.masked_fill(~dense.keep, -1.0)
    count = max(1, round(density * dense.possible_count))
    cut = order.flatten().topk(count).values[-1]
    return BlockPattern(dense.keep & (order >= cut), dense.block_size, causal, length, length)


def _first(order: Tensor, possible: Tensor, density: float) -> Tensor:
    """The earliest possible blocks of every head, (num_heads, q_blocks, kv_blocks), as many as the density allows."""
    count = max(round(density * int(possible.sum())), possible.shape[0])
    ranks = order.masked_fill(~possible, math.inf).flatten(1).argsort(dim=1, stable=True)
    keep = torch.zeros(ranks.shape, dtype=torch.bool)
    return keep.scatter_(1, ranks[:, :count], True).view_as(order)


def _sink_and_window(distance: Tensor, num_heads: int, generator: torch.Generator) -> Tensor:
    order = distance.clone()
    order[:, 0] = 0.0
    return order.expand(num_heads, -1, -1)


def _bigbird(distance: Tensor, num_heads: int, generator: torch.Generator) -> Tensor:
    rows = len(distance)
    chance = torch.rand(num_heads, rows, rows, dtype=torch.float32, generator=generator).argsort(-1).argsort(-1)
    # Only the random places that a query may see count, so the rank is scaled to the row's own length.
    places = torch.arange(1, rows + 1)[:, None] / rows
    columns = torch.arange(rows).expand(rows, -1)
    return torch.minimum(torch.minimum(distance / 3, columns / 2), (1 + chance) * places / 3)


def _longformer_dilated(distance: Tensor, num_heads: int, generator: torch.Generator) -> Tensor:
    dilated = torch.where(distance % 2 == 0, distance / 2, _LAST + distance)
    order = torch.stack([dilated if head % 2 else distance for head in range(num_heads)])
    order[:, :, 0] = 0.0
    return order


def _strided(distance: Tensor, num_heads: int, generator: torch.Generator) -> Tensor:
    stride = max(2, round(math.sqrt(len(distance))))
    strided = torch.where(distance % stride == 0, distance / stride, _LAST + distance)
    return torch.minimum(distance, strided).expand(num_heads, -1, -1)


_ORDERS = {
    "sink_and_window": _sink_and_window,
    "bigbird": _bigbird,
    "longformer_dilated": _longformer_dilated,
    "strided": _strided,
}
