"""Selection: new patterns from scores, constraints and a threshold.

Everything but the cut itself is a transform of scores: blocks that must stay score infinity, blocks that must go
minus infinity. One threshold over all layers and heads then decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_prune.constraints import Constraints
from sparse_prune.pattern import BlockPattern


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer in the selection."""

    name: str
    """Qualified name of the layer."""
    scores: Tensor
    """float32 or float64, (num_heads, q_blocks, kv_blocks)."""
    pattern: BlockPattern
    """The pattern in force, of the same shape."""
    num_kv_heads: int
    """Key and value heads; they divide the query heads."""
    frozen: bool = False
    """Whether the pattern is settled and must not move."""


def select(
    layers: Sequence[LayerScores],
    constraints: Constraints,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
    signed: bool = False,
) -> tuple[list[BlockPattern], float]:
    """Select new patterns by a threshold, or by the threshold that reaches a sparsity.

    Sparsity counts the possible blocks of all given layers, protected and frozen ones included. If constraints keep
    more than it allows, every free block is pruned and the achieved sparsity is lower. Blocks without any attention are
    pruned first, all together, so that the achieved sparsity is higher if there are many.

    Scores that may be negative (`Score.signed`) have no geometric mean: on a diagonal they are drawn to its mean
    instead of its largest one, by an arithmetic mean, and the query heads of a KV head share their sum. A threshold of
    0 is then a cut like any other: blocks that score less are pruned.

    Args:
        layers: Scores and patterns in force.
        constraints: Blocks that stay in any case, and changes of scores before the cut.
        threshold: Cut-off on scores, at least 0 unless they are signed: blocks below it are pruned.
        sparsity: Share of possible blocks to prune, in [0, 1].
        signed: Whether scores may be negative.

    Returns:
        The patterns, and the threshold in force.

    Raises:
        ValueError: Unless exactly one of `threshold` and `sparsity` is given, or if scores are NaN.
    """
    if (threshold is None) == (sparsity is None):
        raise ValueError(f"Give `threshold` or `sparsity`, not both or none; got {threshold} and {sparsity}.")
    effective = [_effective(layer, constraints, signed) for layer in layers]
    if threshold is None:
        assert sparsity is not None
        values = torch.cat([s[:, layer.pattern.possible].flatten() for s, layer in zip(effective, layers, strict=True)])
        threshold = _solve_signed(values, sparsity) if signed else _solve(values, sparsity)
    patterns = []
    for layer, scores in zip(layers, effective, strict=True):
        old = layer.pattern
        keep = scores >= threshold if signed or threshold > 0 else scores > -torch.inf
        patterns.append(BlockPattern(keep, old.block_size, old.causal, old.q_len, old.kv_len))
    return patterns, threshold


def _solve(values: Tensor, sparsity: float) -> float:
    """Find the threshold that prunes `sparsity` of the values: 0 for none, just past the largest for all free ones."""
    count, scores = int(sparsity * values.numel() + 0.5), values.numpy(force=True)
    if count == 0:
        return 0.0
    # Blocks that must go sort first, those that must stay last. Only the first value that may stay is needed: numpy
    # finds it in linear time, more than ten times as fast as torch sorts or selects.
    first = float(np.partition(scores, count)[count]) if count < scores.size else math.inf
    if 0.0 < first < math.inf:
        return first
    free = scores[np.isfinite(scores)]
    if first == -math.inf or not free.size:
        return 0.0
    if first < math.inf:
        # Blocks without attention are all alike: they go together.
        attended = free[free > 0]
        if attended.size:
            return float(attended.min())
    past = np.nextafter(free.max(), scores.dtype.type(np.inf))
    return float(max(past, np.finfo(scores.dtype).tiny))


def _solve_signed(values: Tensor, sparsity: float) -> float:
    """Solve as `_solve`, with 0 a score like any other: the least free score prunes none."""
    count, scores = int(sparsity * values.numel() + 0.5), values.numpy(force=True)
    free = scores[np.isfinite(scores)]
    if not free.size:
        return 0.0
    first = float(np.partition(scores, count)[count]) if count < scores.size else math.inf
    if first == math.inf:
        return float(np.nextafter(free.max(), scores.dtype.type(np.inf)))
    return max(first, float(free.min()))


def _effective(layer: LayerScores, constraints: Constraints, signed: bool = False) -> Tensor:
    """Fold every constraint into the scores."""
    pattern, scores = layer.pattern, layer.scores
    if scores.amax().isnan():  # the largest of values among which one is NaN
        raise ValueError(f"Scores of layer {layer.name!r} must not be NaN. Lower the learning rate.")
    if layer.frozen:
        return torch.where(pattern.keep, torch.inf, -torch.inf)
    scores = scores.masked_fill(~pattern.possible, 0.0)
    if constraints.share_kv_groups:
        group = pattern.num_heads // layer.num_kv_heads
        grouped = scores.view(-1, group, *scores.shape[1:])
        scores = (grouped.sum(1) if signed else grouped.amax(1)).repeat_interleave(group, 0)
    weight = constraints.share_diagonals
    if weight is None:
        weight = 0.5 if pattern.causal else 0.0
    if weight:
        scores = _shared_diagonals(scores, pattern, constraints.sink_blocks, weight, signed)
    if constraints.reach_price:
        distance = _distance(pattern)
        price = 1.0 + constraints.reach_price * distance / max(int(distance.max()), 1)
        scores = torch.where(scores < 0, scores * price, scores / price)
    kept = torch.where(scores < 0, scores / (1.0 + constraints.hysteresis), scores * (1.0 + constraints.hysteresis))
    scores = torch.where(pattern.keep, kept, scores)
    if not constraints.regrow:
        scores = scores.masked_fill(~pattern.keep, -torch.inf)
    forced = _forced(layer, constraints)
    if constraints.far_field != "block":
        scores = _whole(scores, pattern.possible & ~forced, constraints.far_field == "layer")
    floor = int(-(-constraints.min_density * int(pattern.possible.sum()) // 1))
    if floor:
        possible = scores.masked_fill(~pattern.possible, -torch.inf).flatten(1)
        forced |= (
            torch.zeros_like(possible, dtype=torch.bool).scatter_(1, possible.topk(floor).indices, True).view_as(forced)
        )
    scores = scores.masked_fill(forced, torch.inf).masked_fill(~pattern.possible, -torch.inf)
    return _filled(scores, pattern, constraints.sink_blocks) if constraints.fill_reach else scores


def _whole(scores: Tensor, far: Tensor, of_layer: bool) -> Tensor:
    """Replace the scores of the far field by their mean in the head or in the layer."""
    sums, counts = scores.masked_fill(~far, 0.0).sum((1, 2)), far.sum((1, 2))
    if of_layer:
        sums, counts = sums.sum().expand_as(sums), counts.sum().expand_as(counts)
    return torch.where(far, (sums / counts.clamp(min=1))[:, None, None], scores)


def _filled(scores: Tensor, pattern: BlockPattern, sink_blocks: int) -> Tensor:
    """Let scores never fall toward the diagonal: each becomes the largest from there outwards, sinks excepted."""
    first, last = _standing(pattern)
    col = torch.arange(scores.shape[2])
    before = pattern.possible & (col >= sink_blocks) & (col < first)
    after = pattern.possible & (col > last)
    rising = scores.masked_fill(~before, -torch.inf).cummax(-1).values
    falling = scores.masked_fill(~after, -torch.inf).flip(-1).cummax(-1).values.flip(-1)
    return torch.where(before, rising, torch.where(after, falling, scores))


def _distance(pattern: BlockPattern) -> Tensor:
    """Count key blocks from a block to the nearest one that its row's queries are in, int64, (q_blocks, kv_blocks)."""
    first, last = _standing(pattern)
    col = torch.arange(pattern.keep.shape[2])
    return torch.clamp(torch.maximum(first - col, col - last), min=0)


def _shared_diagonals(
    scores: Tensor, pattern: BlockPattern, sink_blocks: int, weight: float, signed: bool = False
) -> Tensor:
    """Draw scores toward the largest known one on their diagonal, or to its mean if signed; sinks keep theirs."""
    first, last = _standing(pattern)
    col = torch.arange(scores.shape[2])
    shared = pattern.possible & (col >= sink_blocks)
    # Blocks after the main diagonal, in bidirectional patterns, have diagonals of their own.
    distance = _distance(pattern)
    index = torch.where(col > last, distance + scores.shape[2], distance)[shared]
    flat = scores[:, shared]
    size = (len(scores), 2 * scores.shape[2] + 1)
    places = index.expand(len(scores), -1)
    # A diagonal without a known score stays unknown.
    if signed:
        known = flat.isfinite()
        total = torch.zeros(size, dtype=scores.dtype).scatter_add_(1, places, flat.masked_fill(~known, 0.0))
        count = torch.zeros(size, dtype=scores.dtype).scatter_add_(1, places, known.to(scores.dtype))
        shares = torch.where(count > 0, total / count, torch.inf)
    else:
        largest = torch.full(size, -torch.inf, dtype=scores.dtype)
        largest.scatter_reduce_(1, places, torch.where(flat.isinf(), -torch.inf, flat), "amax")
        shares = torch.where(largest == -torch.inf, torch.inf, largest)
    diagonal = shares[:, index]
    # A block without a known score takes its diagonal's.
    own = torch.where(flat.isinf(), diagonal, flat)
    scores = scores.clone()
    drawn = own * (1.0 - weight) + diagonal * weight if signed else own ** (1.0 - weight) * diagonal**weight
    # Where nothing is known the score stays infinite, with a weight of 1 too.
    scores[:, shared] = torch.where(own.isinf(), torch.inf, drawn) if signed else drawn
    return scores


def _standing(pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """Return the first and last key block that a row's queries are in, int64, (q_blocks, 1) each."""
    block_q, block_kv = pattern.block_size
    offset = pattern.kv_len - pattern.q_len if pattern.causal else 0
    row = torch.arange(pattern.keep.shape[1])[:, None]
    first = (row * block_q + offset) // block_kv
    return first, (torch.clamp((row + 1) * block_q, max=pattern.q_len) - 1 + offset) // block_kv


def _forced(layer: LayerScores, constraints: Constraints) -> Tensor:
    """Mark blocks that stay in any case, boolean, (num_heads, q_blocks, kv_blocks).

    The diagonal is among them, so every row keeps a block.
    """
    pattern = layer.pattern
    first, last = _standing(pattern)
    col = torch.arange(pattern.keep.shape[2])[None, :]
    near = constraints.recent_blocks - 1
    forced = (col <= (last if pattern.causal else last + near)) & (col >= first - near)
    forced = (forced | (col < constraints.sink_blocks)).expand_as(pattern.keep).clone()
    if layer.name in constraints.protected_layers:
        forced[:] = True
    heads = (constraints.protected_heads or {}).get(layer.name, ())
    forced[list(heads)] = True
    return forced & pattern.possible
