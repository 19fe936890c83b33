"""The pruner's state of one layer: what a decision does to it, and how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparse_prune.attention import PrunableAttention
from sparse_prune.codec import compress, decode, decompress, encode
from sparse_prune.pattern import BlockPattern
from sparse_prune.ranges import check_range
from sparse_prune.scores import STATISTICS, BlockStatistics, Score, ScoreAverage
from sparse_prune.selection import LayerScores

STATE_VERSION = 4
_READABLE = (2, 3, 4)


@dataclass
class StabilityTracker:
    """Tells when a pattern has settled: when it changed by at most `min_delta` in `patience` checks in a row.

    Raises:
        ValueError: If `min_delta` is outside [0, 1] or `patience` is below 1.
    """

    min_delta: float = 0.05
    """Largest change between two patterns that counts as stable (Jaccard distance)."""
    patience: int = 3
    """Stable checks in a row until the pattern has settled. At least 1."""
    calm_checks: int = 0
    """Stable checks in a row so far."""
    change: float = 1.0
    """Change at the last check."""

    def __post_init__(self) -> None:
        check_range("[0, 1]", min_delta=self.min_delta)
        check_range("[1, inf)", patience=self.patience)

    @property
    def settled(self) -> bool:
        """Whether the pattern has settled."""
        return self.calm_checks >= self.patience

    def update(self, change: float) -> bool:
        """Record the change since the last pattern; return whether the pattern has settled."""
        self.change = change
        self.calm_checks = self.calm_checks + 1 if change <= self.min_delta else 0
        return self.settled


@dataclass(eq=False)
class LayerState:
    """The pruner's state of one layer."""

    layer: PrunableAttention
    scores: ScoreAverage
    mass: ScoreAverage
    """Average of row mass, which tells how much attention the kept blocks hold."""
    tracker: StabilityTracker
    settled_at: int | None = None
    """Optimizer step at which the pattern was frozen."""
    unused_pattern: BlockPattern | None = None
    """The pattern with which the layer settled, if the layer was reverted to dense attention."""
    asked: dict[str, ScoreAverage] = field(default_factory=dict)
    """Averages beside that of training: of questions, say. A block has the largest of its scores."""

    @property
    def reverted(self) -> bool:
        """Whether the layer was reverted to dense attention after it had settled."""
        return self.unused_pattern is not None

    @property
    def mass_kept(self) -> float:
        """Share of dense attention probability that falls into kept blocks, in [0, 1].

        In packed sequences, where a block counts the rows that reach it, all blocks weigh alike.
        """
        kept, total = (part.sum() for part in self._mass())
        return float(kept / total) if total > 0 else 1.0

    @property
    def head_mass_kept(self) -> list[float]:
        """The same per head."""
        kept, total = self._mass()
        return [float(k / t) if t > 0 else 1.0 for k, t in zip(kept, total, strict=True)]

    def _mass(self) -> tuple[Tensor, Tensor]:
        """Sum probability in kept and in all blocks per head, (num_heads,) each; zeros before the first decision."""
        pattern = self.layer.pattern
        if pattern is None or self.mass.empty:
            zero = torch.zeros(self.layer.num_heads)
            return zero, zero
        mass = self.mass.value()
        keep = _fitted(pattern, mass.shape).keep
        mass = mass.masked_fill(mass == torch.inf, 0.0)
        return (mass * keep).sum((1, 2)), mass.sum((1, 2))

    def average_beside(self, name: str) -> ScoreAverage:
        """Return one of `asked`, a plain mean, which is made when it is first asked for."""
        return self.asked.setdefault(name, ScoreAverage(self.scores.kind, decay=1.0))

    def pattern_at_scores(self, block_size: tuple[int, int]) -> BlockPattern:
        """Return the pattern in force at the lengths that the scores cover; a settled layer's pattern is unchanged.

        Raises:
            RuntimeError: If nothing was probed yet.
        """
        pattern, shape = self.layer.pattern, self.scores.shape
        if pattern is None:
            # The patterns cover whole blocks; `BlockPattern.at` cuts a ragged end.
            lengths = _lengths(shape, block_size)
            return BlockPattern.dense(self.layer.num_heads, *lengths, block_size, self.layer.causal)
        return pattern if self.settled_at is not None else _fitted(pattern, shape)

    def scored(self, score: Score, block_size: tuple[int, int]) -> LayerScores:
        """Return the layer as `select` takes it.

        A reverted layer counts as if it were still pruned, so that the others need not make up for it.
        """
        pattern, frozen = self.unused_pattern or self.pattern_at_scores(block_size), self.settled_at is not None
        scores = pattern.keep.float() if frozen else self._largest(score)  # those of a frozen layer are not used
        return LayerScores(self.layer.name, scores, pattern, self.layer.num_kv_heads, frozen)

    def _largest(self, score: Score) -> Tensor:
        """Return the largest of a block's scores, in training and in `asked`; infinite if training never showed it."""
        scores = _values(self.scores, score)
        for asked in self.asked.values():
            known = _values(asked, score)[:, : scores.shape[1], : scores.shape[2]]
            part = scores[:, : known.shape[1], : known.shape[2]]  # scores may be negative where nothing was asked
            part.copy_(part.maximum(known.masked_fill(known == torch.inf, -torch.inf)))
        return scores

    def move(self, pattern: BlockPattern, block_size: tuple[int, int]) -> float:
        """Put a new pattern in force; return its change (Jaccard distance)."""
        change = pattern.difference(self.pattern_at_scores(block_size))
        self.layer.pattern = pattern
        self.layer.mode = "masked" if pattern.kept_blocks < pattern.possible_count else "dense"
        return change

    def settle(self, step: int, change: float) -> bool:
        """Freeze the pattern if it is stable with this change; return whether it is."""
        settled = self.tracker.update(change)
        if settled:
            self.settled_at, self.layer.probe_block_size = step, None
        return settled

    def revert(self) -> None:
        """Give a settled layer all its connections back, in dense attention."""
        pattern = self.layer.pattern
        assert pattern is not None
        self.unused_pattern = pattern
        self.layer.pattern = replace(pattern, keep=pattern.possible.expand_as(pattern.keep).clone())
        self.layer.mode = "dense"

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decision depends on; large tensors are compressed."""
        layer = self.layer
        patterns = {"in_force": layer.pattern, "given_back": self.unused_pattern}
        return {
            "num_heads": layer.num_heads,
            "causal": layer.causal,
            "patterns": encode({name: pattern for name, pattern in patterns.items() if pattern is not None}),
            "mode": layer.mode,
            "backend": layer.backend,
            "scores": self.scores.state_dict(),
            "mass": self.mass.state_dict(),
            "asked": {name: average.state_dict() for name, average in self.asked.items()},
            "calm_checks": self.tracker.calm_checks,
            "change": self.tracker.change,
            "settled_at": self.settled_at,
            "statistics": _compressed(layer.statistics),
            "score_sums": _compressed(layer.score_sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        layer = self.layer
        patterns = decode(state["patterns"]) if "patterns" in state else _patterns_of_version_3(state)
        layer.pattern, self.unused_pattern = patterns.get("in_force"), patterns.get("given_back")
        layer.mode, layer.backend = state["mode"], state["backend"]
        self.scores.load_state_dict(state["scores"])
        self.mass.load_state_dict(state["mass"])
        self.asked = {}
        for name, average in state.get("asked", {}).items():  # older state has none
            self.average_beside(name).load_state_dict(average)
        self.tracker.calm_checks, self.tracker.change = state["calm_checks"], state["change"]
        self.settled_at = state["settled_at"]
        layer.statistics = _decompressed(state["statistics"], STATISTICS)
        own = state.get("score_sums")  # older state has none
        layer.score_sums = _decompressed(own, (layer.score.kind,)) if layer.score is not None else None


def check_version(saved: Mapping[str, Any]) -> None:
    """Refuse the state of a pruner that this version cannot read."""
    if saved.get("version") not in _READABLE:
        known = " or ".join(map(str, _READABLE))
        raise ValueError(
            f"Pruning state must have version {known}, got {saved.get('version')!r}. Load it with the version of "
            "sparse_prune that saved it."
        )


def check_layers(saved: Mapping[str, Mapping[str, Any]], layers: Mapping[str, PrunableAttention]) -> None:
    """Refuse the states of another model's layers."""
    if set(saved) != set(layers):
        missing, extra = sorted(set(layers) - set(saved)), sorted(set(saved) - set(layers))
        raise ValueError(
            f"The checkpoint is of another model: it lacks the layers {missing[:4]} and has {extra[:4]} instead. "
            "Resume with the model that was saved."
        )
    for name, part in saved.items():
        layer = layers[name]
        # A layer without a call in this run takes its causality from the run that is resumed.
        causal = layer.causal if layer.seen else part["causal"]
        if (part["num_heads"], part["causal"]) != (layer.num_heads, causal):
            raise ValueError(
                f"The checkpoint is of another model: layer {name!r} has {part['num_heads']} heads "
                f"(causal={part['causal']}) there, {layer.num_heads} (causal={layer.causal}) here. Resume with the "
                "model that was saved."
            )


def _patterns_of_version_3(state: Mapping[str, Any]) -> dict[str, BlockPattern]:
    """Decode patterns of state before version 4, which held their masks, and block size and lengths once."""
    masks = {"in_force": state["keep"], "given_back": state["given_back"]}
    return {
        name: BlockPattern(decompress(keep), state["block_size"], state["causal"], *state["lengths"])
        for name, keep in masks.items()
        if keep is not None
    }


def _compressed(seen: BlockStatistics | None) -> dict[str, Any] | None:
    return None if seen is None else {"sums": compress(seen.sums), "counts": seen.counts.cpu()}


def _decompressed(held: Mapping[str, Any] | None, kinds: tuple[str, ...]) -> BlockStatistics | None:
    if held is None:
        return None
    counts = held["counts"]
    if counts.dim() < 4:  # older state: one for all heads, with or without key blocks
        counts = counts.reshape(len(counts), 1, counts.shape[1], -1)
    return BlockStatistics(decompress(held["sums"]), counts, kinds)


def _values(average: ScoreAverage, score: Score) -> Tensor:
    """Convert an average to scores; blocks that were never seen score infinity."""
    known = average.value()
    return torch.where(known == torch.inf, known, score.value(known))


def _fitted(pattern: BlockPattern, scores: torch.Size) -> BlockPattern:
    """Return the pattern at the lengths that scores of a shape cover."""
    return pattern if scores == pattern.keep.shape else pattern.at(*_lengths(scores, pattern.block_size))


def _lengths(scores: torch.Size, block_size: tuple[int, int]) -> tuple[int, int]:
    """Return the lengths that scores of a shape cover, for self-attention in whole blocks."""
    length = min(scores[1] * block_size[0], scores[2] * block_size[1])
    return length, length
