"""The pruning loop without a Trainer: probe, score, select, settle, freeze."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_prune.attention import PrunableAttention, attach, handle_of
from sparse_prune.pattern import BlockPattern, check_block_size
from sparse_prune.schedules import Schedule
from sparse_prune.scores import BlockStatistics, ScoreAverage, Statistic
from sparse_prune.selection import Constraints, LayerScores, row_mass, select
from sparse_prune.stability import StabilityTracker

Criterion = Literal["score", "row_mass"]
Reduce = Callable[[dict[str, BlockStatistics]], dict[str, BlockStatistics]]
_STATE_VERSION = 2


@dataclass(eq=False)
class LayerState:
    """What the pruner remembers about a layer."""

    layer: PrunableAttention
    scores: ScoreAverage
    mass: ScoreAverage
    """Average of plain row mass, to tell how much attention the kept blocks hold."""
    tracker: StabilityTracker
    settled_at: int | None = None
    """Optimizer step at which the pattern was frozen."""
    given_back: BlockPattern | None = None
    """The pattern with which it settled, if the swap gained nothing and the layer got all its connections back."""

    @property
    def restored(self) -> bool:
        """Whether the layer was given all its connections back."""
        return self.given_back is not None

    @property
    def mass_kept(self) -> float:
        """Share of dense attention probability that falls into kept blocks, in [0, 1]."""
        kept, total = (part.sum() for part in self._mass())
        return float(kept / total) if total > 0 else 1.0

    @property
    def head_mass_kept(self) -> list[float]:
        """The same per head."""
        kept, total = self._mass()
        return [float(k / t) if t > 0 else 1.0 for k, t in zip(kept, total, strict=True)]

    def _mass(self) -> tuple[Tensor, Tensor]:
        """Probability in kept blocks and in all blocks per head, (num_heads,) each; zeros before the first decision."""
        pattern = self.layer.pattern
        if pattern is None or self.mass.empty:
            zero = torch.zeros(self.layer.num_heads)
            return zero, zero
        mass = self.mass.value()
        keep = pattern.at(*_lengths(mass, pattern)).keep if mass.shape != pattern.keep.shape else pattern.keep
        mass = mass.where(mass.isfinite(), 0.0)
        return (mass * keep).sum((1, 2)), mass.sum((1, 2))


@dataclass(frozen=True)
class PruneReport:
    """What one decision did. Shares are in [0, 1]."""

    step: int
    """Optimizer steps taken."""
    threshold: float
    """Cut-off on scores in force."""
    requested: float
    """Value of the schedule."""
    sparsity: float
    """Share of possible blocks pruned, over all layers and heads."""
    layer_sparsity: dict[str, float]
    """Layer -> share of its possible blocks pruned."""
    change: dict[str, float]
    """Layer -> change of the pattern at this decision (Jaccard distance)."""
    mass_kept: dict[str, float]
    """Layer -> share of dense attention probability that falls into kept blocks."""
    settled: tuple[str, ...] = ()
    """Layers that settled at this decision."""


@dataclass(eq=False)
class AttentionPruner:
    """Prunes the attention connections of a model step by step.

    Per training step that is to be watched: `probe(True)`, run the model, `probe(False)`; after the optimizer
    step `update(step)`.

    Raises:
        ValueError: If not exactly one of `sparsity` and `threshold` is given, or a value is out of range.
    """

    sparsity: Schedule | None = None
    """Share of possible blocks to prune, over all layers; the threshold is solved for."""
    threshold: Schedule | None = None
    """Cut-off on scores: blocks below it go."""
    block_size: int | tuple[int, int] = 64
    """Tokens per block side, or (query, key)."""
    statistic: Statistic = "max"
    """Which statistic of row mass is the score."""
    criterion: Criterion = "score"
    """Compare the threshold with scores, or with the share of its row that a block and all weaker ones hold."""
    decay: float = 0.9
    """Decay of the score average per probe, in [0, 1)."""
    constraints: Constraints = field(default_factory=Constraints)
    """What pruning must respect."""
    min_delta: float = 0.05
    """Largest change of a pattern that counts as standing still."""
    patience: int = 3
    """Decisions in a row that must stand still after the ramp."""

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError("Give `sparsity` or `threshold`, a schedule each; got both or none.")
        if self.sparsity is not None and self.sparsity.final >= 1.0:
            raise ValueError(
                f"`sparsity` must end below 1, got {self.sparsity.final}. It is a share, not a percentage."
            )
        if self.criterion not in ("score", "row_mass"):
            raise ValueError(f"`criterion` must be 'score' or 'row_mass', got {self.criterion!r}.")
        self.block_size = check_block_size(self.block_size)
        self._new_state()  # checks statistic, decay, min_delta and patience now, not after hours of training
        self.layers: dict[str, LayerState] = {}

    def _new_state(self) -> tuple[ScoreAverage, ScoreAverage, StabilityTracker]:
        average = ScoreAverage(self.statistic, self.decay)
        return average, ScoreAverage("mean", self.decay), StabilityTracker(self.min_delta, self.patience)

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        schedule = self.sparsity or self.threshold
        assert schedule is not None
        return schedule

    def attach(self, model: nn.Module, module: str | None = None) -> None:
        """Find the attention layers of a model and take them over.

        Patterns that the layers have already are where pruning starts.

        Args:
            model: Any module; its `example_input_array`, if it has one, is the example of `attention.attach`.
            module: Qualified name of the module inside whose layers are pruned; None: all of them.

        Raises:
            ValueError: If there are none, if `module`, a protected layer or head does not exist, or if there are
                patterns of another block size already.
        """
        handles = attach(model, module=module)
        for handle in handles:
            if handle.pattern is not None and handle.pattern.block_size != self.block_size:
                raise ValueError(
                    f"`block_size` must be {handle.pattern.block_size} as in the pattern that layer {handle.name!r} "
                    f"has already, got {self.block_size}. Use that size, or `sparse_prune.attention.detach(model)` "
                    "first to start from dense attention."
                )
        self._begin(handles)
        heads = self.constraints.protected_heads or {}
        for name in (*self.constraints.protected_layers, *heads):
            if name not in self.layers:
                raise ValueError(
                    f"`protected_layers` and `protected_heads` must name attention layers, got {name!r}. "
                    f"The layers are {list(self.layers)}."
                )
            count = self.layers[name].layer.num_heads
            wrong = [head for head in heads.get(name, ()) if not 0 <= head < count]
            if wrong:
                raise ValueError(f"`protected_heads` of {name!r} must lie in 0..{count - 1}, got {wrong}.")

    def attached_to(self, model: nn.Module) -> bool:
        """Whether the layers are those of this model.

        Args:
            model: Any module.
        """
        there = {id(handle) for module in model.modules() if (handle := handle_of(module)) is not None}
        return bool(self.layers) and all(id(state.layer) in there for state in self.layers.values())

    def restart(self) -> None:
        """Forget all decisions; the patterns in force stay until the next one."""
        self._begin([state.layer for state in self.layers.values()])

    def _begin(self, handles: list[PrunableAttention]) -> None:
        self.layers = {handle.name: LayerState(handle, *self._new_state()) for handle in handles}
        self.forget()

    @property
    def open_layers(self) -> list[LayerState]:
        """Layers that were seen and whose pattern may still move."""
        return [state for state in self.layers.values() if state.settled_at is None and not state.scores.empty]

    def probe(self, enabled: bool) -> None:
        """Watch the next training steps, or stop watching. Frozen layers are never probed."""
        assert isinstance(self.block_size, tuple)
        for state in self.layers.values():
            state.layer.probe_block_size = self.block_size if enabled and state.settled_at is None else None

    def update(self, step: int, reduce: Reduce | None = None) -> PruneReport | None:
        """Decide on new patterns after an optimizer step.

        Args:
            step: Optimizer steps taken so far.
            reduce: Adds up the ranks' statistics in a fixed order, so that all ranks decide the same.

        Returns:
            What was decided; None if nothing was probed.

        Raises:
            ValueError: If logits were NaN or infinite, on all ranks alike; the message names the layers.
        """
        found = {name: state.layer.take_statistics() for name, state in self.layers.items()}
        statistics = {name: seen for name, seen in found.items() if seen is not None}
        if reduce is not None:
            statistics = reduce(statistics)
        if not statistics:
            return None
        _check_finite(statistics)
        for name, seen in statistics.items():
            self.layers[name].scores.update(seen)
            self.layers[name].mass.update(seen)
        known = [state for state in self.layers.values() if not state.scores.empty]
        requested = self.schedule(step)
        patterns, threshold = self._select(known, requested)
        change, settled = {}, []
        for state, pattern in zip(known, patterns, strict=True):
            if state.settled_at is not None:
                continue
            layer = state.layer
            change[layer.name] = pattern.difference(self._current(state))
            layer.pattern = pattern
            layer.mode = "masked" if pattern.kept_blocks < pattern.possible_count else "dense"
            if step >= self.schedule.end_step and state.tracker.update(change[layer.name]):
                state.settled_at = step
                layer.probe_block_size = None
                settled.append(layer.name)
        return self._report(step, threshold, requested, change, tuple(settled))

    def forget(self) -> None:
        """Drop what was probed since the last decision."""
        for state in self.layers.values():
            state.layer.take_statistics()

    def _select(self, states: list[LayerState], requested: float) -> tuple[list[BlockPattern], float]:
        layers = []
        for state in states:
            # What was given back counts as if it were still pruned, so that the others need not make up for it.
            pattern, scores = state.given_back or self._current(state), state.scores.value()
            if state.settled_at is not None:
                scores = pattern.keep.float()  # not looked at: the layer is frozen
            elif self.criterion == "row_mass":
                scores = row_mass(state.mass.value())
            layer = state.layer
            layers.append(LayerScores(layer.name, scores, pattern, layer.num_kv_heads, state.settled_at is not None))
        if self.sparsity is not None:
            return select(layers, self.constraints, sparsity=requested)
        return select(layers, self.constraints, threshold=requested)

    def _current(self, state: LayerState) -> BlockPattern:
        """The pattern in force, at the lengths that the scores cover."""
        layer, scores = state.layer, state.scores.value()
        if layer.pattern is not None:
            if state.settled_at is not None or scores.shape == layer.pattern.keep.shape:
                return layer.pattern
            return layer.pattern.at(*_lengths(scores, layer.pattern))
        assert isinstance(self.block_size, tuple)
        rows, cols = scores.shape[1:]
        # The patterns cover whole blocks; a ragged end is a matter of `BlockPattern.at`.
        length = min(rows * self.block_size[0], cols * self.block_size[1])
        return BlockPattern.dense(layer.num_heads, length, length, self.block_size, layer.causal)

    def _report(
        self, step: int, threshold: float, requested: float, change: dict[str, float], settled: tuple[str, ...]
    ) -> PruneReport:
        patterns = {name: state.layer.pattern for name, state in self.layers.items()}
        sparsity = {name: pattern.sparsity for name, pattern in patterns.items() if pattern is not None}
        mass = {name: self.layers[name].mass_kept for name in sparsity}
        return PruneReport(step, threshold, requested, self.total_sparsity, sparsity, change, mass, settled)

    @property
    def total_sparsity(self) -> float:
        """Share of possible blocks pruned, over all layers and heads, in [0, 1]."""
        patterns = [state.layer.pattern for state in self.layers.values()]
        known = [pattern for pattern in patterns if pattern is not None]
        possible = sum(pattern.possible_count for pattern in known)
        return 1.0 - sum(pattern.kept_blocks for pattern in known) / possible if possible else 0.0

    def swap(self, name: str, backend: str) -> None:
        """Let a settled layer skip its pruned blocks from now on.

        Args:
            name: Qualified name of the layer.
            backend: One of `sparse_prune.kernels.BACKENDS`.

        Raises:
            ValueError: If the layer has not settled.
        """
        self._settled(name).layer.backend = backend
        self._settled(name).layer.mode = "sparse"

    def restore(self, name: str) -> None:
        """Give a settled layer all its connections back: it gains nothing from losing them. The others lose no more.

        Args:
            name: Qualified name of the layer.

        Raises:
            ValueError: If the layer has not settled.
        """
        state = self._settled(name)
        pattern = state.layer.pattern
        assert pattern is not None
        state.given_back = pattern
        state.layer.pattern = replace(pattern, keep=pattern.possible.expand_as(pattern.keep).clone())
        state.layer.mode = "dense"

    def _settled(self, name: str) -> LayerState:
        state = self.layers[name]
        if state.settled_at is None:
            raise ValueError(f"Layer {name!r} must have settled before it is swapped; it is still moving.")
        return state

    @property
    def patterns(self) -> dict[str, BlockPattern]:
        """Layer -> pattern in force, for the layers that have one."""
        return {n: state.layer.pattern for n, state in self.layers.items() if state.layer.pattern is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on."""
        return {
            "version": _STATE_VERSION,
            "block_size": self.block_size,
            "layers": {name: _layer_state(state) for name, state in self.layers.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; if that was before `attach`, nothing had been decided.

        Nothing changes if the state does not fit.

        Raises:
            ValueError: If the state is of another version, block size or model; the message names what differs.
        """
        if saved.get("version") != _STATE_VERSION:
            raise ValueError(f"Pruning state must have version {_STATE_VERSION}, got {saved.get('version')!r}.")
        if tuple(saved["block_size"]) != self.block_size:
            raise ValueError(
                f"`block_size` must be {tuple(saved['block_size'])} as in the checkpoint, got {self.block_size}."
            )
        layers = saved["layers"]
        if not layers:
            self.restart()
            return
        if set(layers) != set(self.layers):
            missing, extra = sorted(set(self.layers) - set(layers)), sorted(set(layers) - set(self.layers))
            raise ValueError(
                f"The checkpoint is of another model: it lacks the layers {missing[:4]} and has {extra[:4]} instead. "
                "Resume with the model that was saved."
            )
        for name, part in layers.items():
            layer = self.layers[name].layer
            if (part["num_heads"], part["causal"]) != (layer.num_heads, layer.causal):
                raise ValueError(
                    f"The checkpoint is of another model: layer {name!r} has {part['num_heads']} heads "
                    f"(causal={part['causal']}) there, {layer.num_heads} (causal={layer.causal}) here."
                )
        for name, part in layers.items():
            _load_layer_state(self.layers[name], part)


def _check_finite(statistics: Mapping[str, BlockStatistics]) -> None:
    bad = [name for name, seen in statistics.items() if not torch.isfinite(seen.sums).all()]
    if bad:
        raise ValueError(
            f"Layer {bad[0]!r}: attention logits must be finite, got NaN or infinity ({len(bad)} of {len(statistics)} "
            "layers). Resume from an earlier checkpoint with a lower learning rate, or clip gradients."
        )


def _lengths(scores: Tensor, pattern: BlockPattern) -> tuple[int, int]:
    """Lengths that `scores` cover, for self-attention in whole blocks."""
    length = min(scores.shape[1] * pattern.block_size[0], scores.shape[2] * pattern.block_size[1])
    return length, length


def kv_blocks_droppable(pattern: BlockPattern, num_kv_heads: int) -> float:
    """Share of the KV cache that no query after the pattern's last one may attend to, in [0, 1].

    A KV head's block is needed as long as any of its query heads may attend to it, however far in the future.
    """
    per_head = pattern.needed_after(pattern.kv_len).view(num_kv_heads, -1, pattern.keep.shape[2]).any(1)
    return 1.0 - float(per_head.float().mean())


def attention_flops(pattern: BlockPattern, head_dim: int, batch: int = 1) -> tuple[int, int]:
    """Multiply-adds times two of one forward pass through the kept and through all possible blocks."""
    per_block = 4 * math.prod(pattern.block_size) * head_dim * batch
    return pattern.kept_blocks * per_block, pattern.possible_count * per_block


def _layer_state(state: LayerState) -> dict[str, Any]:
    layer, pattern = state.layer, state.layer.pattern
    return {
        "num_heads": layer.num_heads,
        "causal": layer.causal,
        "keep": None if pattern is None else pattern.keep,
        "lengths": None if pattern is None else (pattern.q_len, pattern.kv_len),
        "mode": layer.mode,
        "backend": layer.backend,
        "scores": state.scores.state_dict(),
        "mass": state.mass.state_dict(),
        "calm_checks": state.tracker.calm_checks,
        "change": state.tracker.change,
        "settled_at": state.settled_at,
        "given_back": None if state.given_back is None else state.given_back.keep,
        "statistics": None
        if layer.statistics is None
        else {"sums": layer.statistics.sums.cpu(), "counts": layer.statistics.counts.cpu()},
        "block_size": None if pattern is None else pattern.block_size,
    }


def _load_layer_state(state: LayerState, part: Mapping[str, Any]) -> None:
    layer = state.layer
    layer.pattern = _saved_pattern(part, part["keep"], layer.causal)
    layer.mode, layer.backend = part["mode"], part["backend"]
    state.scores.load_state_dict(part["scores"])
    state.mass.load_state_dict(part["mass"])
    state.tracker.calm_checks, state.tracker.change = part["calm_checks"], part["change"]
    state.settled_at = part["settled_at"]
    state.given_back = _saved_pattern(part, part["given_back"], layer.causal)
    layer.statistics = None if part["statistics"] is None else BlockStatistics(**part["statistics"])


def _saved_pattern(part: Mapping[str, Any], keep: Tensor | None, causal: bool) -> BlockPattern | None:
    return None if keep is None else BlockPattern(keep, part["block_size"], causal, *part["lengths"])
