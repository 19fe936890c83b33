"""Logs pruning to the Trainer's loggers, and writes patterns to files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from torch import Tensor
from typing_extensions import override

from sparse_prune.callbacks import logger_kinds
from sparse_prune.callbacks.collaborator import Collaborator
from sparse_prune.callbacks.kernel_swap import KernelSwap
from sparse_prune.callbacks.run_folder import run_folder
from sparse_prune.callbacks.step_clock import StepClock
from sparse_prune.callbacks.uploads import Uploads
from sparse_prune.export import PATTERN_FILE, save_patterns
from sparse_prune.export.history import remove_frames, save_frame
from sparse_prune.machine import describe_machine
from sparse_prune.metrics import Moment, head_table, layer_numbers, measure, summarize
from sparse_prune.pattern import BlockPattern
from sparse_prune.pictures import draw_layer, views
from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner
from sparse_prune.ranges import check_range
from sparse_prune.swap_event import SwapEvent

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 10.0
"""Longest wait for the hand-over of files at the end of a run."""


class SparsityLogger(Collaborator):
    """Logs sparsity, threshold, settling, swaps, speed and savings through `trainer.loggers`.

    `AttentionPruning` calls it after its decisions and swaps.

    `sparse_prune.metrics.METRICS` lists keys, units and meanings; shares are in [0, 1]. Times are those of
    this process, logged every `Trainer.log_every_n_steps` steps, without the swap's measurements.

    W&B and TensorBoard also get pictures: patterns/atlas (all layers and heads: scores, kept, pruned and regrown
    blocks) while patterns move, patterns/layer_NN when a layer settles and at the end. W&B also gets the table
    patterns/heads, the patterns as versions of an artifact, and a summary. The patterns, and their history for
    `sparse-prune report`, are written beside the logs, even if an exception or Ctrl-C ends the run.

    The settings of pruning, the machine and the versions join the loggers' hyperparameters, under pruning/.

    A logger that fails is reported once and skipped for the rest of the fit. Training goes on, and never waits for
    uploads of W&B.

    Args:
        images: Whether to draw patterns.
        every_n_decisions: Decisions between pictures of the atlas and frames of the history.

    Raises:
        ValueError: If `every_n_decisions` is below 1; in `setup`, if the Trainer has no `AttentionPruning`.
    """

    def __init__(self, images: bool = True, every_n_decisions: int = 5) -> None:
        check_range("[1, inf)", every_n_decisions=every_n_decisions)
        self.images = images
        self.every_n_decisions = every_n_decisions
        self._uploads = Uploads()
        self._failed: set[int] = set()  # loggers of the fit that runs
        self._folder: Path | None = None  # of the fit that runs; None also where no files are kept
        self.forget_run()

    @override
    def forget_run(self) -> None:
        """Reset the state of a run."""
        self._logged_step = 0  # step of the last decision that was logged
        self._logged_swaps = 0
        self._decisions = 0
        self._drawn: dict[str, Tensor] = {}  # the keep masks of the last atlas
        self._clock = StepClock()
        self._apart = 0.0  # seconds that were no part of a step when the batch began

    def begin_fit(self, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
        """Find the folder of the run, on every rank; log settings, and retry loggers that failed in an earlier fit."""
        self._failed, self._uploads = set(), Uploads()
        # Under `fast_dev_run` a fit leaves no files.
        self._folder = None if trainer.fast_dev_run else run_folder(trainer)  # type: ignore[attr-defined]
        self._each(trainer, logger_kinds.describe_metrics)
        self.log_settings(trainer, settings)

    def log_settings(self, trainer: pl.Trainer, settings: dict[str, Any]) -> None:
        """Log settings as hyperparameters, at the start and once a setting that was left open is decided."""
        machine = {f"pruning/{name}": text for name, text in describe_machine().items()}
        self._each(trainer, partial(logger_kinds.log_settings, trainer=trainer, settings=settings | machine))

    def begin_training(self, trainer: pl.Trainer) -> None:
        """Remove frames of an earlier run after this step."""
        if self._folder is not None and trainer.is_global_zero:
            try:
                remove_frames(self._folder, after=trainer.global_step)
            except OSError as error:
                log.warning("Frames of an earlier run stay in the pattern history: %r", error)

    def begin_batch(self, pl_module: pl.LightningModule, apart: float) -> None:
        """Start the clock of a batch; `apart` is the seconds that this process spent outside of any step so far."""
        self._apart = apart
        self._clock.start(pl_module.device)

    def end_batch(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        pruner: AttentionPruner,
        report: PruneReport | None,
        swap: KernelSwap,
        apart: float,
    ) -> None:
        """Log new metrics and pictures; `apart` as in `begin_batch`."""
        self._clock.stop(pl_module.device, _tokens(pruner), apart=apart - self._apart)
        metrics = self._clock.read(trainer.global_step, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        decided = report is not None and report.step > self._logged_step
        fresh = swap.events[self._logged_swaps :]
        if report is not None and (decided or fresh):
            changes = ["pattern", *(["decision"] if decided else []), *(["swap"] if fresh else [])]
            metrics |= measure(Moment(pruner, report, fresh, swap.events), *changes)
        if report is not None and decided:
            self._logged_step = report.step
            self._decisions += 1
            if (self._decisions - 1) % self.every_n_decisions == 0:
                self._snapshot(trainer, pruner)
        if fresh:
            metrics |= self._clock.at_swap()
            self._logged_swaps = len(swap.events)
            settled = {event.layer for event in fresh}
            self._draw(trainer, pruner, {n: p for n, p in pruner.patterns.items() if n in settled})
            self._keep_patterns(trainer, pruner, ["latest"], {"step": float(trainer.global_step)})
        if metrics:
            self._each(trainer, lambda logger: logger.log_metrics(metrics, step=_step(trainer)))

    def end_fit(
        self, trainer: pl.Trainer, pruner: AttentionPruner, report: PruneReport | None, events: list[SwapEvent]
    ) -> Path | None:
        """Log the end of the run and write its patterns.

        Returns:
            The file of the patterns, on rank 0; None if none was written.
        """
        patterns, file = pruner.patterns, None
        if patterns and report is not None:
            open_layers = {state.layer.name for state in pruner.open_layers}
            self._draw(trainer, pruner, {n: p for n, p in patterns.items() if n in open_layers})
            self._snapshot(trainer, pruner)
            summary = summarize(pruner)
            file = self._keep_patterns(trainer, pruner, ["latest", "final"], summary)
            if trainer.is_global_zero:
                table, step = head_table(pruner, events), _step(trainer)
                self._each(trainer, partial(logger_kinds.log_summary, summary=summary, step=step))
                for logger in trainer.loggers:
                    if logger_kinds.is_wandb(logger):
                        self._uploads.submit(_name(logger), partial(logger_kinds.log_table, logger, table, step))
                self._uploads.wait(UPLOAD_SECONDS)
        self._folder = None
        return file

    def broken_off(self, trainer: pl.Trainer, pruner: AttentionPruner, report: PruneReport | None) -> Path | None:
        """Write files and log nothing: a network could delay a user who wants to stop, and other ranks may be gone.

        Returns:
            As `end_fit`.
        """
        folder, self._folder = self._folder, None
        if folder is None or report is None or not trainer.is_global_zero:
            return None
        file = folder / PATTERN_FILE
        try:
            _save(pruner, file)
            save_frame(pruner.patterns, folder, trainer.global_step)
        except Exception as error:  # this must not hide the error that ended the run
            log.warning("The attention patterns of the broken run were not written to %s: %r", folder, error)
            return None
        return file

    def _snapshot(self, trainer: pl.Trainer, pruner: AttentionPruner) -> None:
        """Log the atlas, and write a frame of the history."""
        if not trainer.is_global_zero:
            return
        patterns = pruner.patterns
        if self._folder is not None:
            try:
                save_frame(patterns, self._folder, trainer.global_step)
            except OSError as error:
                log.warning("No frame of the pattern history was written at step %d: %r", trainer.global_step, error)
        if self.images and any(logger_kinds.takes_pictures(logger) for logger in trainer.loggers):
            # A layer may have a pattern of an earlier run and no scores in this one yet.
            averages = {name: pruner.layers[name].scores for name in patterns}
            scores = {name: average.value() for name, average in averages.items() if not average.empty}
            layers = views(patterns, scores, self._drawn)
            self._drawn = {name: pattern.keep for name, pattern in patterns.items()}
            self._each(trainer, partial(logger_kinds.log_atlas, layers=layers, step=_step(trainer)))

    def _draw(self, trainer: pl.Trainer, pruner: AttentionPruner, patterns: dict[str, BlockPattern]) -> None:
        if self.images and trainer.is_global_zero:
            numbers = layer_numbers(pruner)
            for name, pattern in patterns.items():
                key, caption = f"patterns/layer_{numbers[name]:02d}", f"{name}: {pattern.sparsity:.1%} pruned"
                show = partial(logger_kinds.log_picture, key=key, picture=draw_layer(pattern), caption=caption)
                self._each(trainer, partial(show, step=_step(trainer)))

    def _keep_patterns(
        self, trainer: pl.Trainer, pruner: AttentionPruner, aliases: list[str], metadata: dict[str, float]
    ) -> Path | None:
        """Write the patterns beside the logs, and upload them as a version of the run's artifact."""
        if self._folder is None or not trainer.is_global_zero:
            return None
        path = self._folder / PATTERN_FILE
        try:
            _save(pruner, path)
        except OSError as error:
            log.warning("The attention patterns were not written to %s: %r", path, error)
            return None

        def upload(logger: Logger) -> None:
            if logger_kinds.is_wandb(logger):
                self._uploads.submit(_name(logger), logger_kinds.version_of(logger, path, aliases, metadata))

        self._each(trainer, upload)
        return path

    def _each(self, trainer: pl.Trainer, action: Callable[[Logger], None]) -> None:
        """Call an action on rank 0 for every logger; one that fails is dropped with one warning."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if id(logger) in self._failed:
                continue
            try:
                action(logger)
            except Exception as error:  # a logger is foreign code on a network: no error of it may stop a run
                self._failed.add(id(logger))
                log.warning("%s failed and gets no more sparsity logs: %r", _name(logger), error)

    @override
    def state(self) -> dict[str, Any]:
        return {
            "logged_step": self._logged_step,
            "logged_swaps": self._logged_swaps,
            "decisions": self._decisions,
            "drawn": self._drawn,
        }

    @override
    def load_state(self, state: dict[str, Any]) -> None:
        self._logged_step, self._logged_swaps = state["logged_step"], state["logged_swaps"]
        self._decisions, self._drawn = state["decisions"], state["drawn"]


def _save(pruner: AttentionPruner, path: Path) -> None:
    """Save the patterns in force, and the unused ones of reverted layers, which may be faster on another machine."""
    unused = {name: state.unused_pattern for name, state in pruner.layers.items() if state.unused_pattern is not None}
    save_patterns(pruner.patterns, path, unused=unused)


def _tokens(pruner: AttentionPruner) -> int:
    """Count the tokens of the batch: those of the layer that sees the most."""
    shapes = [state.layer.last_shape for state in pruner.layers.values()]
    return max((shape.batch * shape.q_len for shape in shapes if shape is not None), default=0)


def _step(trainer: pl.Trainer) -> int:
    """Return the step under which Lightning itself logs this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _name(logger: Logger) -> str:
    return type(logger).__name__
