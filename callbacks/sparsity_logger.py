"""What pruning does, into the trainer's loggers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from sparse_prune.callbacks.kernel_swap import KernelSwap, find_pruning
from typing_extensions import override

from sparse_prune.export import PATTERN_FILE, describe_pruning, save_patterns
from sparse_prune.pattern import BlockPattern
from sparse_prune.pruner import AttentionPruner, PruneReport, attention_flops, kv_blocks_droppable

log = logging.getLogger(__name__)


class SparsityLogger(pl.Callback):
    """Logs sparsity, threshold, settling, swaps and savings through `trainer.loggers`.

    Shares are in [0, 1]. Keys: prune/threshold, prune/requested, sparsity/total, sparsity/layer_NN,
    settle/change_layer_NN, mass/kept, mass/kept_layer_NN, swap/layer_NN (1 = sparse, 0 = back to dense),
    swap/sparse_layers, savings/attention_flops, savings/attention_flops_share, savings/kv_bytes,
    savings/kv_share. W&B and TensorBoard also get a picture per layer; W&B the patterns as an artifact and a summary.

    A logger that fails is reported once and left alone from then on; training goes on.

    Args:
        images: Draw the patterns, heads side by side, when layers settle and at the end.
    """

    def __init__(self, images: bool = True) -> None:
        self.images = images
        self._logged_step = 0  # step of the last decision that was logged
        self._logged_swaps = 0
        self._failed: set[int] = set()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pruning, swaps = find_pruning(trainer), _events(trainer)
        report, index = pruning.report, {name: i for i, name in enumerate(pruning.pruner.layers)}
        metrics: dict[str, float] = {}
        if report is not None and report.step > self._logged_step:
            metrics |= decision_metrics(report, index) | savings_metrics(pruning.pruner)
            self._logged_step = report.step
        for event in swaps[self._logged_swaps :]:
            metrics[f"swap/layer_{index[event.layer]:02d}"] = float(event.backend != "dense")
            metrics["swap/sparse_layers"] = float(sum(e.backend != "dense" for e in swaps))
        if len(swaps) > self._logged_swaps:
            metrics["sparsity/total"] = pruning.pruner.total_sparsity
            settled = {e.layer for e in swaps[self._logged_swaps :]}
            self._logged_swaps = len(swaps)
            self._draw(trainer, {n: p for n, p in pruning.pruner.patterns.items() if n in settled}, index)
        if metrics:
            self._each(trainer, lambda logger: logger.log_metrics(metrics, step=_step(trainer)))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruning = find_pruning(trainer)
        patterns = pruning.pruner.patterns
        if not patterns or pruning.report is None:
            return
        index = {name: i for i, name in enumerate(pruning.pruner.layers)}
        open_layers = {state.layer.name for state in pruning.pruner.open_layers}
        self._draw(trainer, {n: p for n, p in patterns.items() if n in open_layers}, index)
        summary = summarize(pruning.pruner, _events(trainer))
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: every rank must ask
        if trainer.is_global_zero:
            path = save_patterns(patterns, folder / PATTERN_FILE, describe_pruning(pruning.pruner))
            log.info("Attention patterns: %s. %s", path, summary)
            self._each(trainer, lambda logger: _finish(logger, path, summary))

    def _draw(self, trainer: pl.Trainer, patterns: dict[str, BlockPattern], index: dict[str, int]) -> None:
        if self.images and trainer.is_global_zero:
            for name, pattern in patterns.items():
                key, picture = f"patterns/layer_{index[name]:02d}", draw(pattern)
                self._each(trainer, partial(_log_image, key=key, picture=picture, step=_step(trainer)))

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
                log.warning("%s failed and gets no more sparsity logs: %r", type(logger).__name__, error)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"logged_step": self._logged_step, "logged_swaps": self._logged_swaps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged_step, self._logged_swaps = state_dict["logged_step"], state_dict["logged_swaps"]


def decision_metrics(report: PruneReport, index: dict[str, int]) -> dict[str, float]:
    """One decision as metrics; `index` maps layers to their numbers."""
    metrics = {
        "prune/threshold": report.threshold,
        "prune/requested": report.requested,
        "sparsity/total": report.sparsity,
        "mass/kept": sum(report.mass_kept.values()) / len(report.mass_kept),
    }
    metrics |= {f"sparsity/layer_{index[name]:02d}": value for name, value in report.layer_sparsity.items()}
    metrics |= {f"settle/change_layer_{index[name]:02d}": value for name, value in report.change.items()}
    return metrics | {f"mass/kept_layer_{index[name]:02d}": value for name, value in report.mass_kept.items()}


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


def summarize(pruner: AttentionPruner, events: list[Any]) -> dict[str, float]:
    """The end of a run in a few numbers."""
    settled = sum(state.settled_at is not None for state in pruner.layers.values())
    return {
        "final/sparsity": pruner.total_sparsity,
        "final/settled_layers": float(settled),
        "final/sparse_layers": float(sum(state.layer.mode == "sparse" for state in pruner.layers.values())),
        "final/layers": float(len(pruner.layers)),
    }


def draw(pattern: BlockPattern, pixels: int = 96) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Heads side by side: kept blocks dark, pruned ones light, impossible ones white. (height, width, 3)."""
    scale = max(1, pixels // pattern.keep.shape[1])
    keep, possible = pattern.keep.numpy(), pattern.possible.numpy()
    colours = np.full((*keep.shape, 3), 255, dtype=np.uint8)
    colours[:, possible] = (222, 226, 235)
    colours[keep] = (29, 78, 137)
    tiles = [np.kron(head, np.ones((scale, scale, 1), dtype=np.uint8)) for head in colours]
    gap = np.full((tiles[0].shape[0], 4, 3), 255, dtype=np.uint8)
    row = [part for tile in tiles for part in (tile, gap)][:-1]
    return np.concatenate(row, axis=1).astype(np.uint8)


def _events(trainer: pl.Trainer) -> list[Any]:
    swaps = [callback for callback in trainer.callbacks if isinstance(callback, KernelSwap)]  # type: ignore[attr-defined]
    return swaps[0].events if swaps else []


def _step(trainer: pl.Trainer) -> int:
    """The step under which Lightning itself logs this batch."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def _log_image(logger: Logger, key: str, picture: np.ndarray[Any, np.dtype[np.uint8]], step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [picture], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, picture, step, dataformats="HWC")


def _finish(logger: Logger, path: Path, summary: dict[str, float]) -> None:
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    run = logger.experiment
    run.summary.update(summary)
    artifact = wandb.Artifact(f"attention-pattern-{run.id}", type="attention-pattern", metadata=summary)
    artifact.add_file(str(path))
    run.log_artifact(artifact)
