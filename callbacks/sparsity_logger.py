"""What pruning does, into the trainer's loggers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from sparse_prune.callbacks.atlas import LEGEND, LayerView, Picture, draw_layer, views
from sparse_prune.callbacks.atlas_frame import framed_atlas
from sparse_prune.callbacks.kernel_swap import KernelSwap, SwapEvent, find_pruning
from sparse_prune.callbacks.pattern_history import remove_frames, save_frame
from sparse_prune.callbacks.run_folder import run_folder
from sparse_prune.callbacks.uploads import Uploads
from torch import Tensor
from typing_extensions import override

from sparse_prune.export import save_patterns
from sparse_prune.pattern import BlockPattern
from sparse_prune.pruner import AttentionPruner, PruneReport, attention_flops, kv_blocks_droppable

log = logging.getLogger(__name__)

PATTERN_FILE = "attention_pattern.safetensors"
SUMMARIES = {"train/loss": "min,last", "val/loss": "min,last", "time/tokens_per_second": "mean,last"}
"""What W&B's summary holds of a key, where the last value is not what one wants to know."""
UPLOAD_SECONDS = 10.0
"""To wait for files to be handed over at the end of a run."""


class SparsityLogger(pl.Callback):
    """Logs sparsity, threshold, settling, swaps, speed and savings through `trainer.loggers`.

    Shares are in [0, 1]. Keys: prune/threshold, prune/requested, sparsity/total, sparsity/layer_NN,
    settle/change_layer_NN, settle/min_delta (the line under which a layer settles), mass/kept, mass/kept_layer_NN,
    swap/layer_NN (1 = sparse, 0 = back to dense), swap/sparse_layers, time/step_seconds and time/tokens_per_second
    (of this process, every `Trainer.log_every_n_steps`; with _at_swap the last of them again, to mark swaps on the
    curve), savings/attention_flops, savings/attention_flops_share, savings/kv_bytes, savings/kv_share.

    W&B and TensorBoard also get pictures: patterns/atlas (all layers and heads: scores, kept, pruned and regrown
    blocks) while patterns move, patterns/layer_NN when a layer settles and at the end. W&B gets the table
    patterns/heads, the patterns as versions of an artifact, and a summary. The patterns, and their history for
    `sparse-prune report`, are also written beside the logs.

    A logger that fails is reported once and left alone from then on; training goes on, and never waits for files that
    W&B uploads.

    Args:
        images: Draw patterns.
        every_n_decisions: Decisions between pictures of the atlas and frames of the history.

    Raises:
        ValueError: If `every_n_decisions` is below 1.
    """

    def __init__(self, images: bool = True, every_n_decisions: int = 5) -> None:
        if every_n_decisions < 1:
            raise ValueError(f"`every_n_decisions` must be at least 1, got {every_n_decisions}.")
        self.images = images
        self.every_n_decisions = every_n_decisions
        self._uploads = Uploads()
        self.forget_run()

    def forget_run(self) -> None:
        """A new run begins: nothing of it was logged."""
        self._logged_step = 0  # step of the last decision that was logged
        self._logged_swaps = 0
        self._decisions = 0
        self._drawn: dict[str, Tensor] = {}  # the keep masks of the last atlas
        self._failed: set[int] = set()
        self._clock = _StepClock()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._each(trainer, _describe_metrics)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._clock.start()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pruning, swaps = find_pruning(trainer), _events(trainer)
        pruner, report = pruning.pruner, pruning.report
        index = {name: i for i, name in enumerate(pruner.layers)}
        metrics = self._clock.stop(trainer, pruner)
        if report is not None and report.step > self._logged_step:
            metrics |= decision_metrics(report, index, pruner.min_delta) | savings_metrics(pruner)
            self._logged_step = report.step
            self._decisions += 1
            if (self._decisions - 1) % self.every_n_decisions == 0:
                self._snapshot(trainer, pruner, first=self._decisions == 1)
        fresh = swaps[self._logged_swaps :]
        if fresh:
            metrics |= swap_metrics(fresh, swaps, index) | {"sparsity/total": pruner.total_sparsity}
            metrics |= self._clock.at_swap()
            self._logged_swaps = len(swaps)
            settled = {event.layer for event in fresh}
            self._draw(trainer, {n: p for n, p in pruner.patterns.items() if n in settled}, index)
            self._keep_patterns(trainer, pruner, ["latest"], {"step": float(trainer.global_step)})
        if metrics:
            self._each(trainer, lambda logger: logger.log_metrics(metrics, step=_step(trainer)))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruning = find_pruning(trainer)
        pruner, patterns = pruning.pruner, pruning.pruner.patterns
        if not patterns or pruning.report is None:
            return
        index = {name: i for i, name in enumerate(pruner.layers)}
        open_layers = {state.layer.name for state in pruner.open_layers}
        self._draw(trainer, {n: p for n, p in patterns.items() if n in open_layers}, index)
        self._snapshot(trainer, pruner)
        summary = summarize(pruner, _events(trainer))
        table, step = head_table(pruner, _events(trainer)), _step(trainer)
        path = self._keep_patterns(trainer, pruner, ["latest", "final"], summary)
        if trainer.is_global_zero:
            log.info("Attention patterns: %s. %s", path or "not kept in a fast_dev_run", summary)
            self._each(trainer, lambda logger: _summarize(logger, summary))
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._uploads.submit(_name(logger), partial(_log_table, logger, table, step))
            self._uploads.wait(UPLOAD_SECONDS)

    def _snapshot(self, trainer: pl.Trainer, pruner: AttentionPruner, first: bool = False) -> None:
        """The atlas into the loggers, and a frame of the history beside them; the first one begins it anew."""
        folder = _folder(trainer)
        if not trainer.is_global_zero:
            return
        patterns = pruner.patterns
        if folder is not None:
            try:
                if first:
                    remove_frames(folder)
                save_frame(patterns, folder, trainer.global_step)
            except OSError as error:
                log.warning("No frame of the pattern history was written at step %d: %r", trainer.global_step, error)
        if self.images and any(_takes_pictures(logger) for logger in trainer.loggers):
            # A layer may have the pattern of an earlier run, and not be seen in this one yet.
            averages = {name: pruner.layers[name].scores for name in patterns}
            scores = {name: average.value() for name, average in averages.items() if not average.empty}
            layers, step = views(patterns, scores, self._drawn), _step(trainer)
            self._drawn = {name: pattern.keep for name, pattern in patterns.items()}
            self._each(trainer, partial(_log_atlas, layers=layers, step=step))

    def _draw(self, trainer: pl.Trainer, patterns: dict[str, BlockPattern], index: dict[str, int]) -> None:
        if self.images and trainer.is_global_zero:
            for name, pattern in patterns.items():
                key, picture = f"patterns/layer_{index[name]:02d}", draw_layer(pattern)
                log_picture = partial(_log_image, key=key, picture=picture, step=_step(trainer))
                self._each(trainer, partial(log_picture, caption=f"{name}: {pattern.sparsity:.1%} pruned"))

    def _keep_patterns(
        self, trainer: pl.Trainer, pruner: AttentionPruner, aliases: list[str], metadata: dict[str, float]
    ) -> Path | None:
        """The patterns as a file beside the logs, and as a version of the run's artifact. None: no files are kept."""
        folder = _folder(trainer)
        if folder is None:
            return None
        path = folder / PATTERN_FILE
        if trainer.is_global_zero:
            try:
                save_patterns(pruner.patterns, path)
            except OSError as error:
                log.warning("The attention patterns were not written to %s: %r", path, error)
                return path
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    self._uploads.submit(_name(logger), _version_of(logger, path, aliases, metadata))
        return path

    @rank_zero_only
    def _each(self, trainer: pl.Trainer, action: Callable[[Logger], None]) -> None:
        """Do something with every logger; one that fails is dropped with one warning."""
        for logger in trainer.loggers:
            if id(logger) in self._failed:
                continue
            try:
                action(logger)
            except Exception as error:  # a logger is any code, on any network: nothing it raises may stop a run
                self._failed.add(id(logger))
                log.warning("%s failed and gets no more sparsity logs: %r", _name(logger), error)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "logged_step": self._logged_step,
            "logged_swaps": self._logged_swaps,
            "decisions": self._decisions,
            "drawn": self._drawn,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged_step, self._logged_swaps = state_dict["logged_step"], state_dict["logged_swaps"]
        self._decisions, self._drawn = state_dict["decisions"], state_dict["drawn"]


class _StepClock:
    """Seconds per optimizer step, and tokens per second, since they were last logged."""

    def __init__(self) -> None:
        self._start = 0.0
        self._seconds = 0.0
        self._tokens = 0
        self._step: int | None = None  # optimizer step at the last log
        self._last: dict[str, float] = {}  # what was logged then

    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self, trainer: pl.Trainer, pruner: AttentionPruner) -> dict[str, float]:
        """Count a batch; metrics when Lightning logs its own."""
        self._seconds += time.perf_counter() - self._start
        shapes = [state.layer.last_shape for state in pruner.layers.values()]
        self._tokens += max((shape.batch * shape.q_len for shape in shapes if shape is not None), default=0)
        if self._step is None:  # the first step warms up
            self._step = trainer.global_step or None
            self._seconds, self._tokens = 0.0, 0
            return {}
        steps = trainer.global_step - self._step
        if steps < max(1, trainer.log_every_n_steps) or not self._seconds:  # type: ignore[attr-defined]
            return {}
        self._last = {
            "time/step_seconds": self._seconds / steps,
            "time/tokens_per_second": self._tokens / self._seconds,
        }
        self._step, self._seconds, self._tokens = trainer.global_step, 0.0, 0
        return self._last.copy()

    def at_swap(self) -> dict[str, float]:
        """The last speed again under keys of its own: marks of the swap on the curves of the speed."""
        return {f"{key}_at_swap": value for key, value in self._last.items()}


def decision_metrics(report: PruneReport, index: dict[str, int], min_delta: float) -> dict[str, float]:
    """One decision as metrics; `index` maps layers to their numbers."""
    metrics = {
        "settle/min_delta": min_delta,
        "prune/threshold": report.threshold,
        "prune/requested": report.requested,
        "sparsity/total": report.sparsity,
        "mass/kept": sum(report.mass_kept.values()) / len(report.mass_kept),
    }
    metrics |= {f"sparsity/layer_{index[name]:02d}": value for name, value in report.layer_sparsity.items()}
    metrics |= {f"settle/change_layer_{index[name]:02d}": value for name, value in report.change.items()}
    return metrics | {f"mass/kept_layer_{index[name]:02d}": value for name, value in report.mass_kept.items()}


def swap_metrics(fresh: list[SwapEvent], swaps: list[SwapEvent], index: dict[str, int]) -> dict[str, float]:
    """New swaps as metrics; `swaps` are all of them."""
    metrics = {f"swap/layer_{index[event.layer]:02d}": float(event.backend != "dense") for event in fresh}
    return metrics | {"swap/sparse_layers": float(sum(event.backend != "dense" for event in swaps))}


HEAD_COLUMNS = ("layer", "head", "sparsity", "mass kept", "change", "settled at", "backend")


def head_table(pruner: AttentionPruner, events: list[SwapEvent]) -> list[list[Any]]:
    """A row per layer and head, with the columns of `HEAD_COLUMNS`."""
    backends = {event.layer: event.backend for event in events}
    rows: list[list[Any]] = []
    for name, state in pruner.layers.items():
        pattern = state.layer.pattern
        if pattern is None:
            continue
        rest = [state.tracker.change, state.settled_at, backends.get(name, state.layer.mode)]
        shares = zip(pattern.head_sparsity.tolist(), state.head_mass_kept, strict=True)
        rows += [[name, head, sparsity, kept, *rest] for head, (sparsity, kept) in enumerate(shares)]
    return rows


def savings_metrics(pruner: AttentionPruner) -> dict[str, float]:
    """Estimates of what the patterns save: FLOPs of one forward pass, and KV cache after it."""
    flops = flops_dense = 0
    bytes_saved = bytes_dense = 0.0
    for state in pruner.layers.values():
        layer, pattern = state.layer, state.layer.pattern
        if pattern is None or layer.last_shape is None:
            continue
        shape = layer.last_shape
        kept, possible = attention_flops(pattern, shape.head_dim, shape.batch)
        flops, flops_dense = flops + kept, flops_dense + possible
        if layer.causal:
            cache = 2 * shape.batch * layer.num_kv_heads * pattern.kv_len * shape.head_dim * shape.dtype.itemsize
            bytes_dense += cache
            bytes_saved += cache * kv_blocks_droppable(pattern, layer.num_kv_heads)
    metrics = {}
    if flops_dense:
        metrics["savings/attention_flops"] = float(flops_dense - flops)
        metrics["savings/attention_flops_share"] = 1.0 - flops / flops_dense
    if bytes_dense:
        metrics["savings/kv_bytes"] = bytes_saved
        metrics["savings/kv_share"] = bytes_saved / bytes_dense
    return metrics


def summarize(pruner: AttentionPruner, events: list[SwapEvent]) -> dict[str, float]:
    """The end of a run in a few numbers."""
    settled = sum(state.settled_at is not None for state in pruner.layers.values())
    return {
        "final/sparsity": pruner.total_sparsity,
        "final/settled_layers": float(settled),
        "final/sparse_layers": float(sum(state.layer.mode == "sparse" for state in pruner.layers.values())),
        "final/layers": float(len(pruner.layers)),
    }


def _events(trainer: pl.Trainer) -> list[SwapEvent]:
    swaps = [callback for callback in trainer.callbacks if isinstance(callback, KernelSwap)]  # type: ignore[attr-defined]
    return swaps[0].events if swaps else []


def _step(trainer: pl.Trainer) -> int:
    """The step under which Lightning itself logs this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _folder(trainer: pl.Trainer) -> Path | None:
    """Where files go; None under `fast_dev_run`, which leaves none."""
    return None if trainer.fast_dev_run else run_folder(trainer)  # type: ignore[attr-defined]


def _name(logger: Logger) -> str:
    return type(logger).__name__


def _takes_pictures(logger: Logger) -> bool:
    return isinstance(logger, WandbLogger | TensorBoardLogger)


def _log_image(logger: Logger, key: str, picture: Picture, step: int, caption: str) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [picture], step=step, caption=[caption])
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, picture, step, dataformats="HWC")


def _log_atlas(logger: Logger, layers: Sequence[LayerView], step: int) -> None:
    if _takes_pictures(logger):
        _log_image(logger, "patterns/atlas", framed_atlas(layers), step, LEGEND)


def _describe_metrics(logger: Logger) -> None:
    """Summaries for W&B; Lightning's logger already makes trainer/global_step the axis of every key."""
    if isinstance(logger, WandbLogger):
        for key, summary in SUMMARIES.items():
            logger.experiment.define_metric(key, step_metric="trainer/global_step", summary=summary)


def _version_of(
    logger: WandbLogger, path: Path, aliases: list[str], metadata: dict[str, float]
) -> Callable[[], object]:
    """What uploads the file as it is now."""
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"attention-pattern-{run.id}", type="attention-pattern", metadata=metadata)
    artifact.add_file(str(path))
    return partial(run.log_artifact, artifact, aliases=aliases)


def _log_table(logger: WandbLogger, table: list[list[Any]], step: int) -> None:
    logger.log_table("patterns/heads", columns=list(HEAD_COLUMNS), data=table, step=step)


def _summarize(logger: Logger, summary: dict[str, float]) -> None:
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(summary)
