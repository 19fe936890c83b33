"""The pruning callback: when to probe and when to decide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch.distributed as dist
from typing_extensions import override

from sparse_prune.attention.averages import share_with_averages
from sparse_prune.callbacks import checks
from sparse_prune.callbacks.closing import closing
from sparse_prune.callbacks.collaborator import Driver, adopted
from sparse_prune.callbacks.kernel_swap import KernelSwap
from sparse_prune.callbacks.lightning import classes, overrides, tell
from sparse_prune.callbacks.randomness import Randomness
from sparse_prune.callbacks.retrieving import module_with_logits, questions_of
from sparse_prune.callbacks.settings import BLOCK_SIZE, pruning_settings
from sparse_prune.callbacks.sparsity_logger import SparsityLogger
from sparse_prune.callbacks.training_step import StandIn
from sparse_prune.constraints import Constraints
from sparse_prune.distributed import sum_over_ranks
from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner, Reduce
from sparse_prune.ranges import check_whole
from sparse_prune.retrieval import Questions, Retrieval
from sparse_prune.schedules import Schedule
from sparse_prune.scores import Criterion, Score, Statistic

log = logging.getLogger(__name__)


class AttentionPruning(Driver):
    """Prunes the attention connections of the model under a schedule while it trains.

    One of these in `Trainer(callbacks=[...])` is enough. After every batch it decides, then calls `swap`, then
    `logging`. A `KernelSwap` or `SparsityLogger` in the Trainer's list, at any place, replaces the default one. More
    than one of a kind is refused.

    The schedule counts steps from the start of the run, those before a resume included. Its shares are shares of
    `Trainer.estimated_stepping_batches`, corrected for a `GradientAccumulationScheduler`. A resumed run keeps the steps
    that its shares were first converted to, whatever its `max_steps`.

    Args:
        sparsity: Schedule of the share of possible blocks to prune, over all layers.
        threshold: Schedule of the cut-off on scores, instead of `sparsity`.
        block_size: Tokens per block side, or (query, key). None: 64, or less for sequences of less than 2048 tokens;
            the first step shows their length, and the second brings the first decision.
        every_n_steps: Optimizer steps between decisions.
        statistic: Score of a block: "mean", "mean_square" or "max" of the row mass in it. "max" spares heads that look
            up single tokens (docs/score_statistics.md).
        criterion: "score", or "row_mass" to keep the fewest blocks that hold a share of every row's mean mass (and
            those that `constraints.share_diagonals` lifts above the cut).
        score: Score of a block, such as Influence() or one of your own (docs/scores.md). None: the one that `statistic`
            and `criterion` name.
        decay: Decay of the score average per decision, in [0, 1).
        constraints: Constraints on pruning.
        min_delta: Largest change of a pattern that counts as stable (Jaccard distance).
        patience: Stable decisions in a row, after the schedule's end, until a layer is frozen.
        module: Qualified name, in the LightningModule, of the module to prune. None: all of it, reference and reward
            models included.
        retrieval: Ask a causal language model, in the first decisions, what stands far back in its texts; keep the
            blocks that it looks at, and whole heads beside those that `constraints` protects (docs/retrieval.md).
            "auto": `Retrieval()` if the model can be asked; if it cannot, the closing summary says why. None: ask
            nothing.
        swap: Swaps settled layers to block-sparse attention. None: `KernelSwap()`.
        logging: Logs what pruning does. None: `SparsityLogger()`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range; in `setup`, if the Trainer holds more than one callback of a kind,
            or trains in copies of this process (ddp_spawn, ddp_fork, ddp_notebook).
    """

    def __init__(
        self,
        sparsity: Schedule | None = None,
        *,
        threshold: Schedule | None = None,
        block_size: int | tuple[int, int] | None = None,
        every_n_steps: int = 10,
        statistic: Statistic = "max",
        criterion: Criterion = "score",
        score: Score | None = None,
        decay: float = 0.9,
        constraints: Constraints | None = None,
        min_delta: float = 0.05,
        patience: int = 3,
        module: str | None = None,
        retrieval: Retrieval | Literal["auto"] | None = "auto",
        swap: KernelSwap | None = None,
        logging: SparsityLogger | None = None,
    ) -> None:
        parts: list[tuple[str, object, type]] = [("swap", swap, KernelSwap), ("logging", logging, SparsityLogger)]
        for name, given, kind in parts:
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"`{name}` must be a {kind.__name__} or None, got {given!r}. Write {kind.__name__}().")
        self.every_n_steps = check_whole("every_n_steps", every_n_steps)
        self.module = module
        self.retrieval = retrieval
        self.pruner = AttentionPruner(
            sparsity=sparsity,
            threshold=threshold,
            block_size=block_size,
            statistic=statistic,
            criterion=criterion,
            score=score,
            decay=decay,
            constraints=constraints or Constraints(),
            min_delta=min_delta,
            patience=patience,
        )
        """The loop without a Trainer: layers, patterns, total sparsity. In training its schedule is in steps."""
        self.swap = swap or KernelSwap()
        """Swaps settled layers; that of the Trainer's list, if it holds one."""
        self.logging = logging or SparsityLogger()
        """Logs; that of the Trainer's list, if it holds one."""
        self._own = self.swap, self.logging
        self._given = swap is not None, logging is not None
        self._schedule = self.pruner.schedule  # as it was given
        self._run_steps: int | None = None  # of the run whose length turned shares into steps
        self.report: PruneReport | None = None
        """The latest decision."""
        self._last_step = 0  # the latest optimizer step seen
        self._resumed = False  # whether the checkpoint of the fit or evaluation that runs held pruning
        self._watching = False  # whether the batch is probed
        self._randomness = Randomness()
        self._looked = False  # whether the first training call of the run was examined
        self._blind = False  # whether the batch began without a block size
        self._probed: StandIn | None = None
        self._scale = 1.0  # the gradient scale before the batch
        self._questions = Questions(self.pruner, retrieval)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checks.refuse_trainer(trainer, stage)
        self._resumed = False
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.swap = adopted(self._own[0], self._given[0], KernelSwap, callbacks)
        self.logging = adopted(self._own[1], self._given[1], SparsityLogger, callbacks)
        # What the module's own `setup` and `configure_model` build, wrap or shard is there only after this hook.
        if stage == "fit" and not any(overrides(pl_module, hook) for hook in ("setup", "configure_model")):
            self._attach(pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._attach(pl_module)
        # Older checkpoints hold the collaborators' states beside this one's.
        for collaborator, name in ((self.swap, "KernelSwap"), (self.logging, "SparsityLogger")):
            if name in checkpoint["callbacks"]:
                collaborator.load_state(checkpoint["callbacks"][name])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._attach(pl_module)
        settings = pruning_settings(
            self.pruner,
            self._schedule,
            every_n_steps=self.every_n_steps,
            module=self.module,
            retrieval=self.retrieval,
            swap=self.swap.backend,
        )
        self.logging.begin_fit(trainer, settings)
        self._release()
        self._probed = StandIn(pl_module, partial(self._probe, pl_module))
        find = partial(module_with_logits, pl_module, self.pruner.layers)
        self._questions.begin(find, questions_of(trainer, pl_module))
        self._randomness.begin_fit()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        self._close(trainer, self.logging.end_fit(trainer, self.pruner, self.report, self.swap.events))

    def _close(self, trainer: pl.Trainer, file: Path | None) -> None:
        """Log the closing summary."""
        has_report = any(isinstance(logger, classes("loggers.CSVLogger")) for logger in trainer.loggers)
        tell(trainer, closing(self.pruner, self.report, self.swap.events, file, has_report, self._questions.unasked))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" and trainer.ckpt_path is not None and not self._resumed:
            log.warning(
                "The checkpoint %s holds no pruning: it is of a dense run, or was saved with `save_weights_only=True`. "
                "Its weights ran with the patterns that the model had already, or dense without any. Pass a whole "
                "checkpoint of the pruned run.",
                trainer.ckpt_path,
            )

    @property
    def _apart(self) -> float:
        """Seconds that this process spent outside of any step, on measurements and questions."""
        return self.swap.timer.seconds + self._questions.seconds

    def _release(self) -> None:
        """Give the module its own training step back."""
        if self._probed is not None:
            self._probed.remove()
        self._probed = None
        self._questions.end()

    def _attach(self, pl_module: pl.LightningModule) -> None:
        if not self.pruner.attached_to(pl_module):
            self._forget_run()
            self.pruner.attach(pl_module, self.module)

    def _forget_run(self) -> None:
        """Reset the state of a run, of the collaborators too."""
        self.report, self._last_step, self._run_steps, self._looked = None, 0, None, False
        self._questions.forget_run()
        self.swap.forget_run()
        self.logging.forget_run()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step < self._last_step:
            log.warning(
                "The fit starts at step %d, but pruning was at step %d. Pruning starts anew from the patterns "
                "in force. Pass `ckpt_path` to resume a run, or leave AttentionPruning out to train with its patterns.",
                trainer.global_step,
                self._last_step,
            )
            self.pruner.restart()
            self._forget_run()
        total = checks.steps_of_run(trainer, pl_module)
        self._resolve_schedule(total)
        if self.report is None:
            checks.warn_of_begin(self.pruner.schedule, trainer.global_step)
            checks.warn_of_return(self.pruner, trainer.global_step)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checks.warn_of_end(self.pruner.schedule, total, self.every_n_steps, self.pruner.patience)
        self.swap.begin_training(pl_module)
        self.logging.begin_training(trainer)
        self._randomness.begin_training()

    def _resolve_schedule(self, total: int | None) -> None:
        """Give the pruner its schedule in steps of the resumed run, or else of one with `total` steps."""
        if not self._schedule.relative:
            return
        self._run_steps = self._run_steps or total
        self.pruner.schedule = checks.in_steps(self._schedule, self._run_steps)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._scale = _gradient_scale(trainer)
        self._watching = self._due(trainer.global_step + 1)
        self._blind = self.pruner.block_size is None
        self.logging.begin_batch(pl_module, self._apart)

    def _probe(self, pl_module: pl.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the training step with the probe on, and nothing else that runs the model.

        If Lightning does the backward pass, the probe stays on until its end: gradient checkpointing runs the layers
        again there, and they must do the same. A step without a loss has no backward pass.
        """
        # Lightning divides the loss of each micro-batch by their number.
        shares = pl_module.trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.pruner.probe(self._watching, gradient_scale=self._scale / shares)
        output = None
        try:
            output = step(*args, **kwargs)
            if not self._looked:
                self._look(pl_module.trainer, pl_module)
        finally:
            if output is None or not pl_module.automatic_optimization:
                self.pruner.probe(False)
        return output

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the block size and forecast the gain after the first forward pass, before any weight has changed."""
        length = trainer.strategy.broadcast(self.pruner.longest_call, src=0)  # all ranks need the same blocks
        if length is None:
            return
        self._looked = True
        if self.pruner.block_size is None:
            self.pruner.choose_block_size(length)
            self.logging.log_settings(trainer, {BLOCK_SIZE: str(self.pruner.block_size)})
        if self.report is None:
            checks.warn_of_reach(self.pruner)
            self.swap.forecast(trainer, pl_module, self.pruner)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.swap.timer.after_backward(pl_module.device)
        # Other callbacks may run the model after the batch. After a manual backward pass the step may continue.
        if pl_module.automatic_optimization:
            self.pruner.probe(False)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pruner.probe(False)
        self._randomness.end_batch(trainer)
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if self._watching:
                self._decide(trainer)
        if self.report is not None:
            # For the progress bar alone, which needs them at every step.
            values = {"prune/sparsity_now": self.pruner.total_sparsity, "prune/threshold_now": self.report.threshold}
            pl_module.log_dict(values, prog_bar=True, logger=False, batch_size=1)
        self.swap.end_batch(trainer, pl_module, self.pruner)
        self.logging.end_batch(trainer, pl_module, self.pruner, self.report, self.swap, self._apart)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.pruner.probe(False)
        self._release()
        file = self.logging.broken_off(trainer, self.pruner, self.report)
        if self.report is not None:
            self._close(trainer, file)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share_with_averages(pl_module)

    def _due(self, step: int) -> bool:
        """Whether a decision falls on this optimizer step, or on an earlier one that had no statistics."""
        if self.report is None:
            return True
        latest = step - (step - 1) % self.every_n_steps
        return self.report.step < latest and bool(self.pruner.open_layers)

    def _decide(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if _gradient_scale(trainer) < self._scale:
            # The scaler found NaN or infinity and skipped the step: the statistics may hold them too.
            self.pruner.forget()
            return
        if self._looked:
            context = trainer.precision_plugin.forward_context()
            self._questions.put(trainer.strategy.root_device, _reduction(trainer), context)
        known = self.pruner.block_size is not None
        report = self.pruner.update(step, _reduction(trainer)) if known else None
        if report is not None:
            if self.report is None:
                checks.warn_of_copies(self.pruner)
            self.report = report
        elif (step - 1) % self.every_n_steps == 0 and not (self._blind and self._looked):
            waiting = [state.layer.name for state in self.pruner.open_layers]
            log.warning(
                "Step %d ran none of the layers %s: the decision waits for a step that does. "
                "Call the attached model in `training_step`.",
                step,
                (waiting or list(self.pruner.layers))[:4],
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        report = None if self.report is None else vars(self.report).copy()
        return {
            "pruner": self.pruner.state_dict(),
            "last_step": self._last_step,
            "report": report,
            "run_steps": self._run_steps,
            "schedule": repr(self._schedule),
            **self._questions.state(),
            "swap": self.swap.state(),
            "logging": self.logging.state(),
            "random": self._randomness.state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self.pruner.load_state_dict(state_dict["pruner"])
        self._last_step = state_dict["last_step"]
        self.report = None if state_dict["report"] is None else PruneReport(**state_dict["report"])
        self._run_steps = state_dict.get("run_steps")  # older state has none
        self._questions.load_state(state_dict)
        if self._run_steps is not None:
            self._resolve_schedule(self._run_steps)
        for collaborator, name in ((self.swap, "swap"), (self.logging, "logging")):
            if name in state_dict:
                collaborator.load_state(state_dict[name])
        if "random" in state_dict:
            self._randomness.load_state(state_dict["random"])
        before = state_dict.get("schedule", repr(self._schedule))
        if self.report is not None and before != repr(self._schedule):
            checks.warn_of_change(before, self._schedule, bool(self.pruner.open_layers))


def _gradient_scale(trainer: pl.Trainer) -> float:
    """Return the scaler's factor on the loss, which falls if a step is skipped; 1 unless the precision is 16-mixed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _reduction(trainer: pl.Trainer) -> Reduce | None:
    """Return the function that adds up the ranks' statistics; None for a single process."""
    if trainer.world_size == 1:
        return None
    return partial(sum_over_ranks, device="cpu" if dist.get_backend() == "gloo" else trainer.strategy.root_device)
