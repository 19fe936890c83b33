"""What whole retrieval heads keep and cost: loss and retrieval tasks after one-shot pruning, no fine-tuning.

    python benchmarks/research/retrieval.py --length 1024 --block-size 16 \
        --output benchmarks/results/retrieval_1024.json

Blocks are scored, and heads sought, on training documents; heads by questions in the wordings for choosing, or by the
tokens of the documents alone. Loss and tasks are of validation documents, in the wordings for testing. Each row is
written as soon as it is there; rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import torch
from one_shot import load, parser, probe, prune, save
from torch import Tensor

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints
from sparse_prune.evaluation import TASKS, all_connections, fresh_cache, mean_loss, measure_task
from sparse_prune.retrieval import far_field_influence, retrieval_probes, strongest_heads, text_probes

_PRUNED_FIRST = "blocks by attention"


def main() -> None:
    """Find heads, then a row per share of heads and per way to find them."""
    options = parser(__doc__, probes=6, sequences=6, prompts=60, block_size=16)
    options.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.1])
    options.add_argument("--by", nargs="+", choices=["words", "tokens"], default=["words"])
    options.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["passkey", "needle", "multi_key"])
    options.add_argument("--questions", type=int, default=4, help="sequences with questions to find heads by")
    arguments = options.parse_args()
    model, tokenizer, sequences = load(arguments)
    watcher = AttentionPruner(ConstantSchedule(final=0.5), block_size=arguments.block_size)
    watcher.attach(model)
    rows = _there(arguments)
    seen = probe(watcher, model, sequences["train"])
    influence: dict[str, dict[str, Tensor]] = {}
    for sparsity in arguments.sparsities:
        for name, by, share in [(_PRUNED_FIRST, None, 0.0)] + [
            (f"{share:.0%} of heads whole, by {by}", by, share) for share in arguments.shares for by in arguments.by
        ]:
            if any((row["name"], row["asked"]) == (name, sparsity) for row in rows):
                continue
            if by is not None and by not in influence:
                influence[by] = _influence(model, tokenizer, watcher, sequences["train"], by, arguments.questions)
            heads = None if by is None else strongest_heads(influence[by], share)
            pruner = prune(watcher, model, seen, sparsity, constraints=Constraints(protected_heads=heads))
            rows.append(_row(arguments, model, tokenizer, sequences["val"], name, sparsity, pruner.total_sparsity))
            save(arguments, rows)
    if not any(row["name"] == "dense" for row in rows):
        with all_connections(model):
            rows.append(_row(arguments, model, tokenizer, sequences["val"], "dense", 0.0, 0.0))
        save(arguments, rows)


def _there(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    if arguments.output is None or not arguments.output.exists():
        return []
    found: list[dict[str, Any]] = json.loads(arguments.output.read_text())["rows"]
    return found


def _influence(
    model: Any, tokenizer: Any, watcher: AttentionPruner, sequences: Tensor, by: str, count: int
) -> dict[str, Tensor]:
    asked = text_probes(tokenizer, sequences, count) if by == "words" else retrieval_probes(sequences, count)
    layers = [state.layer for state in watcher.layers.values()]
    start = time.perf_counter()
    found = far_field_influence(model, lambda tokens: model(input_ids=tokens, use_cache=False).logits, layers, asked)
    print(f"{count} probes by {by}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


@torch.no_grad()
def _row(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    sequences: Tensor,
    name: str,
    asked: float,
    sparsity: float,
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "asked": asked, "sparsity": sparsity}
    row["loss"] = mean_loss(model, sequences, partial(fresh_cache, model))
    filler = sequences.flatten().tolist()
    for task in arguments.tasks:
        score = measure_task(
            model, tokenizer, TASKS[task], filler, arguments.length, partial(fresh_cache, model), arguments.prompts
        )
        low, high = score.interval
        row[task] = {"accuracy": score.accuracy, "low": low, "high": high, "log_prob": score.log_prob}
        row[task] |= {"questions": len(score.answers)}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
