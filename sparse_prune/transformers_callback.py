"""The pruning callback for `transformers.Trainer`."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from sparse_prune.distributed import on_first_rank, sum_over_ranks
from sparse_prune.files import whole_file
from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner
from sparse_prune.ranges import check_whole
from sparse_prune.retrieval import Questions, Retrieval
from sparse_prune.retrieval.asked_model import named_module
from sparse_prune.retrieval.questions import outcome
from sparse_prune.retrieval.text_probes import questions_by
from sparse_prune.swap_event import SwapEvent, tell
from sparse_prune.swap_timer import SwapTimer

log = logging.getLogger(__name__)
STATE_FILE = "attention_pruning.pt"
"""The file that holds the state of pruning in a checkpoint of `transformers.Trainer`."""


class AttentionPruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the attention of the model that a `transformers.Trainer` trains, and swaps settled layers.

    Every checkpoint folder holds its state, so that `trainer.train(resume_from_checkpoint=...)` resumes pruning too.
    Steps are the Trainer's optimizer steps. In Lightning, `AttentionPruning` does more: it logs and forecasts.

    Args:
        pruner: The pruner, with schedule, score and constraints. Shares in its schedule are of the Trainer's
            `max_steps`.
        every_n_steps: Optimizer steps between decisions.
        swap: Measure settled layers, forward and backward; swap those that gain to block-sparse attention and revert
            the others to dense attention. False: patterns stay masks.
        checkpoint: The folder to resume from, if it is not `output_dir/checkpoint-STEP`.
        retrieval: What a causal language model is asked in the first decisions, so that what it looks up is kept: in
            words if the Trainer's `processing_class` is a tokenizer. "auto": `Retrieval()` where the model can be
            asked. None: nothing.

    Raises:
        TypeError: If `pruner` is not an AttentionPruner, or `retrieval` not a Retrieval.
        ValueError: If `every_n_steps` is not a whole number of at least 1. When training starts: with `fp16`, with
            several GPUs in one process, or if the checkpoint to resume from holds no pruning.
    """

    def __init__(
        self,
        pruner: AttentionPruner,
        *,
        every_n_steps: int = 10,
        swap: bool = True,
        checkpoint: str | None = None,
        retrieval: Retrieval | Literal["auto"] | None = "auto",
    ) -> None:
        if not isinstance(pruner, AttentionPruner):
            raise TypeError(f"`pruner` must be an AttentionPruner, got {pruner!r}. Write AttentionPruner(schedule).")
        self.every_n_steps = check_whole("every_n_steps", every_n_steps)
        self.pruner, self.swap, self.checkpoint = pruner, swap, checkpoint
        self.report: PruneReport | None = None
        """The latest decision of this process."""
        self._schedule = pruner.schedule  # as it was given
        self._run_steps = 0
        self._timer = SwapTimer()
        self._questions = Questions(pruner, retrieval)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, processing_class: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the model, and restore the state of a checkpoint that is resumed."""
        _refuse(args)
        self.pruner.attach(model)
        self._run_steps = state.max_steps
        if state.global_step:
            self._resume(Path(self.checkpoint or _folder(args, state)))
        self.pruner.schedule = self._schedule.resolved(self._run_steps)
        self._questions.begin(partial(_asked_module, model), questions_by(processing_class))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the step if a decision is due after it."""
        if self._due(state.global_step + 1):
            self.pruner.probe(True, gradient_scale=1.0 / args.gradient_accumulation_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop probing: the backward pass is done."""
        self.pruner.probe(False)
        self._timer.after_backward(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, then swap the layers that have settled."""
        self.pruner.probe(False)
        if not self._due(state.global_step):
            return
        reduce = partial(sum_over_ranks, device=args.device) if args.world_size > 1 else None
        if self.pruner.block_size is not None:
            context = torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)
            self._questions.put(args.device, reduce, context)
        report = self.pruner.update(state.global_step, reduce)
        self.report = report or self.report
        if self.swap and report is not None and report.settled:
            for event in on_first_rank(partial(self._measured, report)):
                self.pruner.swap(event.layer, event.backend)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of pruning into the checkpoint's folder."""
        if state.is_world_process_zero:
            held = {"pruner": self.pruner.state_dict(), "run_steps": self._run_steps, **self._questions.state()}
            with whole_file(_folder(args, state) / STATE_FILE) as file:
                torch.save(held, file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was pruned."""
        self.pruner.probe(False)
        self._questions.end()
        sparse = sum(layer.layer.mode == "sparse" for layer in self.pruner.layers.values())
        log.info(
            "Pruning: %.1f%% of the attention is pruned; %d of %d layers skip what was pruned.",
            100 * self.pruner.total_sparsity,
            sparse,
            len(self.pruner.layers),
        )
        retrieval = outcome(self.pruner, self._questions.unasked)
        if retrieval is not None:
            log.info(retrieval)

    def _due(self, step: int) -> bool:
        """Whether a decision falls on this optimizer step; the first one falls on the first possible step."""
        if all(layer.layer.pattern is None for layer in self.pruner.layers.values()):
            return True
        return (step - 1) % self.every_n_steps == 0 and bool(self.pruner.open_layers)

    def _resume(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"The checkpoint to resume from must hold {STATE_FILE}, got none in {str(folder)!r}. Give its folder "
                "as `checkpoint`, or start without a checkpoint."
            )
        held = torch.load(path, map_location="cpu", weights_only=True)
        self._run_steps = held["run_steps"]
        self.pruner.load_state_dict(held["pruner"])
        self._questions.load_state(held)

    def _measured(self, report: PruneReport) -> list[SwapEvent]:
        events = [self._timer.event(self.pruner.layers[name].layer, report.step) for name in report.settled]
        for event in events:
            tell(event)
        return events


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _asked_module(model: nn.Module, settings: Retrieval) -> nn.Module:
    """Return what is called with tokens: the model, or its module of that name."""
    return named_module(model, settings.module) if settings.module else model


def _refuse(args: Any) -> None:
    """Refuse settings under which scores would be wrong."""
    if args.fp16:
        raise ValueError("`fp16` must be off while attention is pruned, got True: its scaler skips steps. Use `bf16`.")
    if args.n_gpu > 1:
        raise ValueError(
            f"A process must have one GPU while attention is pruned, got {args.n_gpu}. Start with torchrun, or set "
            "CUDA_VISIBLE_DEVICES."
        )
