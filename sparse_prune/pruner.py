"""The pruning loop without a Trainer: probe, score, select, settle, freeze."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparse_prune.attention import PrunableAttention, attach, handle_of
from sparse_prune.constraints import Constraints
from sparse_prune.layer_state import STATE_VERSION, LayerState, StabilityTracker, check_layers, check_version
from sparse_prune.pattern import BlockPattern, check_block_size, suited_block_size, total_sparsity
from sparse_prune.prune_report import PruneReport
from sparse_prune.ranges import check_range
from sparse_prune.schedules import Schedule
from sparse_prune.scores import BlockStatistics, Criterion, Score, ScoreAverage, Statistic, score_of
from sparse_prune.scores.checks import check_finite, check_gradients
from sparse_prune.selection import select

log = logging.getLogger(__name__)
Reduce = Callable[[dict[str, BlockStatistics]], dict[str, BlockStatistics]]


@dataclass(eq=False)
class AttentionPruner:
    """Prunes the attention connections of a model step by step.

    For a decision call `probe(True)`, run the training step, call `probe(False)`, and after the optimizer step
    `update(step)`.

    Raises:
        TypeError: If `sparsity` or `threshold` is not a schedule, or `constraints` are not `Constraints`.
        ValueError: If not exactly one of `sparsity` and `threshold` is given, or a value is out of range.
    """

    sparsity: Schedule | None = None
    """Schedule of the share of possible blocks to prune, over all layers; the threshold is solved for."""
    threshold: Schedule | None = None
    """Schedule of the cut-off on scores: blocks below it are pruned."""
    block_size: int | tuple[int, int] | None = None
    """Tokens per block side, or (query, key). None: chosen by the length of the first training call."""
    statistic: Statistic = "max"
    """Which statistic of row mass is the score, unless `score` is given."""
    criterion: Criterion = "score"
    """Compare the threshold with scores, or with the share of its row that a block and all weaker ones hold."""
    score: Score | None = None
    """Score of a block (docs/scores.md). None: the one that `statistic` and `criterion` name."""
    decay: float = 0.9
    """Decay of the score average per probe, in [0, 1)."""
    constraints: Constraints = field(default_factory=Constraints)
    """Constraints on pruning."""
    min_delta: float = 0.05
    """Largest change of a pattern that counts as stable (Jaccard distance)."""
    patience: int = 3
    """Stable decisions in a row, after the ramp, until a layer has settled."""

    def __post_init__(self) -> None:
        for name in ("sparsity", "threshold"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, Schedule):
                raise TypeError(
                    f"`{name}` must be a schedule, got {given!r}. Write ConstantSchedule(final=...), or "
                    "CubicSchedule(final=..., end_step=...) to prune gradually."
                )
        if not isinstance(self.constraints, Constraints):
            raise TypeError(
                f"`constraints` must be Constraints, got {self.constraints!r}. Write Constraints(sink_blocks=2), say."
            )
        if (self.sparsity is None) == (self.threshold is None):
            raise ValueError("Give either `sparsity` or `threshold`, a schedule, got both or none.")
        if self.sparsity is not None and self.sparsity.final >= 1.0:
            raise ValueError(
                f"`sparsity` must end below 1, got {self.sparsity.final}. It is a share, not a percentage."
            )
        if self.score is not None and not isinstance(self.score, Score):
            raise TypeError(f"`score` must be a Score or None, got {self.score!r}. Write Influence(), say.")
        named = score_of(self.statistic, self.criterion)
        if self.score is not None and (self.statistic, self.criterion) != ("max", "score"):
            raise ValueError(
                f"Give `score` or `statistic` and `criterion`, got {self.score!r}, {self.statistic!r} and "
                f"{self.criterion!r}. Leave `statistic` and `criterion` out."
            )
        self.score_used: Score = self.score or named
        """The score in use: the given one, or the one that `statistic` and `criterion` name."""
        self._chooses = self.block_size is None
        if self.block_size is not None:
            self.block_size = check_block_size(self.block_size)
        check_range("[0, 1)", decay=self.decay)
        self._new_state()  # checks min_delta and patience now, not after hours of training
        self.layers: dict[str, LayerState] = {}

    def _new_state(self) -> tuple[ScoreAverage, ScoreAverage, StabilityTracker]:
        average = ScoreAverage(self.score_used.kind, self.decay)
        return average, ScoreAverage("mean", self.decay), StabilityTracker(self.min_delta, self.patience)

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens per block side, (query, key), once they are known."""
        assert isinstance(self.block_size, tuple)
        return self.block_size

    @property
    def longest_call(self) -> int | None:
        """Tokens of the longest among the layers' last training calls; None before the first."""
        shapes = [state.layer.last_shape for state in self.layers.values()]
        return max((shape.q_len for shape in shapes if shape is not None), default=None)

    def choose_block_size(self, length: int) -> None:
        """Choose the block size for sequences of a length. Call it once, with the same length on all ranks.

        Args:
            length: Tokens of a sequence.
        """
        self.block_size = suited_block_size(length)
        log.info(
            "Blocks of %d x %d tokens were chosen for sequences of %d tokens (`block_size` sets others).",
            *self.block_size,
            length,
        )

    @property
    def schedule(self) -> Schedule:
        """The schedule in force."""
        schedule = self.sparsity or self.threshold
        assert schedule is not None
        return schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if self.sparsity is not None:
            self.sparsity = schedule
        else:
            self.threshold = schedule

    def attach(self, model: nn.Module, module: str | None = None) -> None:
        """Attach to the attention layers of a model. Pruning starts from the patterns that they have already.

        Args:
            model: Any module; its `example_input_array`, if it has one, is the example of `attention.attach`.
            module: Qualified name of the module inside `model` whose layers are pruned; None: all layers.

        Raises:
            ValueError: If no layer can be pruned, if `module`, a protected layer or head does not exist, or if a layer
                already has a pattern of another block size.
        """
        handles = attach(model, module=module)
        if self._chooses:  # by the calls of this run, not by those of another one
            self.block_size = None
            for handle in handles:
                handle.last_shape = None
        for handle in handles:
            if handle.pattern is not None and self.block_size is None:
                self.block_size = handle.pattern.block_size
            if handle.pattern is not None and handle.pattern.block_size != self.block_size:
                raise ValueError(
                    f"`block_size` must be {handle.pattern.block_size} as in the pattern that layer {handle.name!r} "
                    f"has already, got {self.block_size}. Use that size, or `sparse_prune.attention.detach(model)` "
                    "first to start from dense attention."
                )
        self._begin(handles)
        self.constraints.check_protected({handle.name: handle.num_heads for handle in handles})

    def attached_to(self, model: nn.Module) -> bool:
        """Whether the pruner is attached to the layers of this model.

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
        for handle in handles:
            handle.score = self.score_used if self.score_used.statistic is None else None

    @property
    def open_layers(self) -> list[LayerState]:
        """Layers that were probed and whose pattern may still move."""
        return [state for state in self.layers.values() if state.settled_at is None and not state.scores.empty]

    def probe(self, enabled: bool, *, gradient_scale: float = 1.0) -> None:
        """Switch probing on or off. Settled layers are never probed.

        Before `block_size` is known nothing is probed: the first step then only shows how long the calls are.

        Args:
            enabled: Whether to probe. With a score that sees gradients, keep it on until the backward pass is done.
            gradient_scale: Factor on the loss in the backward pass, such as that of a gradient scaler or one over the
                micro-batches of a step. It is divided out of the gradients that scores see.
        """
        sides = self.sides if enabled and self.block_size is not None else None
        for state in self.layers.values():
            state.layer.probe_block_size = sides if state.settled_at is None else None
            state.layer.gradient_scale = gradient_scale

    def update(self, step: int, reduce: Reduce | None = None) -> PruneReport | None:
        """Decide on new patterns after an optimizer step.

        Args:
            step: Optimizer steps taken so far.
            reduce: Adds up the statistics of all ranks, to the same bits on each (`sparse_prune.distributed`).

        Returns:
            The decision; None if nothing was probed, or only padding.

        Raises:
            ValueError: If logits or gradients were NaN or infinite, or a score that sees gradients saw none; all ranks
                raise alike, and the message names the layer. If `reduce` is given without a block size.
        """
        if self.block_size is None:
            self._choose_by_calls(reduce)
        statistics = self._collected(reduce)
        if not statistics:
            return None
        for name, seen in statistics.items():
            self.layers[name].scores.update(seen)
            self.layers[name].mass.update(seen)
        known = [state for state in self.layers.values() if not state.scores.empty]
        requested = self.schedule(step)
        patterns, threshold = self._select(known, requested)
        change, settled = {}, []
        for state, pattern in zip(known, patterns, strict=True):
            if state.settled_at is None:
                name = state.layer.name
                change[name] = state.move(pattern, self.sides)
                if step >= self.schedule.end_step and state.settle(step, change[name]):
                    settled.append(name)
        return self._report(step, threshold, requested, change, tuple(settled))

    def _choose_by_calls(self, reduce: Reduce | None) -> None:
        """Choose a block size by the calls that were seen, if any."""
        if reduce is not None:
            raise ValueError(
                "`block_size` must be given where several processes prune without AttentionPruning, got None: their "
                f"sequences may differ. Write block_size={suited_block_size(self.longest_call or 2048)[0]}, say."
            )
        if self.longest_call is not None:
            self.choose_block_size(self.longest_call)

    def _collected(self, reduce: Reduce | None) -> dict[str, BlockStatistics]:
        """Take the checked statistics of all ranks, without layers that saw nothing but padding."""
        kinds = tuple(dict.fromkeys((self.score_used.kind, "mean")))
        found = {name: state.layer.take_statistics(kinds) for name, state in self.layers.items()}
        statistics = {name: seen for name, seen in found.items() if seen is not None}
        if reduce is not None:
            statistics = reduce(statistics)
        check_finite(statistics)
        if self.score_used.sees == "gradient":
            check_gradients(statistics, self.score_used, self.constraints.protected_layers)
        trimmed = {name: seen.trimmed(self.sides) for name, seen in statistics.items()}
        return {name: seen for name, seen in trimmed.items() if seen.sums.numel()}

    def forget(self) -> None:
        """Drop the statistics that were collected since the last decision."""
        for state in self.layers.values():
            state.layer.take_statistics()

    def _select(self, states: list[LayerState], requested: float) -> tuple[list[BlockPattern], float]:
        layers = [state.scored(self.score_used, self.sides) for state in states]
        wanted = "threshold" if self.sparsity is None else "sparsity"
        return select(layers, self.constraints, signed=self.score_used.signed, **{wanted: requested})

    def ask(self, statistics: Mapping[str, BlockStatistics], topic: str = "questions") -> None:
        """Score blocks by calls that look things up, beside those of training.

        From now on a block has the largest of its scores in training and in each topic, so that what few tokens of a
        text look up is kept, too. Calls of one topic are averaged.

        Args:
            statistics: Layer -> statistics of such calls, of the score's `kind` (`sparse_prune.retrieval.look_back`).
            topic: What the calls have in common.

        Raises:
            ValueError: If the score sees gradients, which these calls do not have.
        """
        if self.score_used.sees == "gradient":
            raise ValueError(
                f"Questions cannot score blocks by {self.score_used!r}, which needs a backward pass. Use a "
                "`statistic`, or a score of the forward pass."
            )
        for name, seen in statistics.items():
            self.layers[name].average_beside(topic).update(seen)

    def _report(
        self, step: int, threshold: float, requested: float, change: dict[str, float], settled: tuple[str, ...]
    ) -> PruneReport:
        sparsity = {name: pattern.sparsity for name, pattern in self.patterns.items()}
        mass = {name: self.layers[name].mass_kept for name in sparsity}
        return PruneReport(step, threshold, requested, self.total_sparsity, sparsity, change, mass, settled)

    @property
    def total_sparsity(self) -> float:
        """Share of possible blocks pruned, over all heads of the layers that have a pattern, in [0, 1].

        It does not count layers that cannot be pruned (the log names them) or that no training step runs.
        """
        return total_sparsity(self.patterns.values())

    def swap(self, name: str, backend: str) -> None:
        """Swap a settled layer to a backend that skips its pruned blocks.

        Args:
            name: Qualified name of the layer.
            backend: One of `sparse_prune.kernels.BACKENDS`, or "dense" to revert it.

        Raises:
            ValueError: If the layer has not settled.
        """
        if backend == "dense":
            self.revert(name)
        else:
            layer = self._settled(name).layer
            layer.backend, layer.mode = backend, "sparse"

    def revert(self, name: str) -> None:
        """Revert a settled layer to dense attention, with all its connections. The others are not pruned more for it.

        Args:
            name: Qualified name of the layer.

        Raises:
            ValueError: If the layer has not settled.
        """
        self._settled(name).revert()

    restore = revert  # its former name

    def _settled(self, name: str) -> LayerState:
        state = self.layers[name]
        if state.settled_at is None:
            raise ValueError(f"Layer {name!r} must have settled before it is swapped, but its pattern still moves.")
        return state

    @property
    def patterns(self) -> dict[str, BlockPattern]:
        """Layer -> pattern in force, for the layers that have one."""
        return {n: state.layer.pattern for n, state in self.layers.items() if state.layer.pattern is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decision depends on."""
        return {
            "version": STATE_VERSION,
            "block_size": self.block_size,
            "score": type(self.score_used).__name__,
            "layers": {name: state.state_dict() for name, state in self.layers.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned; one that was taken before `attach` restarts pruning.

        Nothing changes if the state does not fit.

        Raises:
            ValueError: If the state is of another version, block size, score or model; the message tells which.
        """
        check_version(saved)
        if saved["block_size"] is None:  # saved before the first training call
            self.restart()
            return
        if self.block_size is None:
            self.block_size = check_block_size(tuple(saved["block_size"]))
        if tuple(saved["block_size"]) != self.block_size:
            raise ValueError(
                f"`block_size` must be {tuple(saved['block_size'])} as in the checkpoint, got {self.block_size}. "
                "Use that size, or start without the checkpoint."
            )
        layers = saved["layers"]
        if not layers:
            self.restart()
            return
        check_layers(layers, {name: state.layer for name, state in self.layers.items()})
        before = saved.get("score")
        if before not in (None, type(self.score_used).__name__):
            raise ValueError(
                f"`score` must be {before} as in the checkpoint, whose averages are its own, got {self.score_used!r}. "
                "Use that score, or start without the checkpoint."
            )
        for name, part in layers.items():
            if before is None and self.score_used.kind == "mean":  # the row-mass criterion kept a statistic beside
                part = {**part, "scores": part["mass"]}
            self.layers[name].layer.causal = part["causal"]
            self.layers[name].load_state_dict(part)
