"""What questions keep and cost: loss and retrieval tasks after one-shot pruning, no fine-tuning.

    python benchmarks/research/retrieval.py --length 1024 --block-size 16 --sparsities 0.7 \
        --output benchmarks/results/retrieval_asked_1024.json

Blocks are scored, and heads sought, on training documents; questions are in the wordings for choosing, or made of the
documents' tokens alone. Loss and tasks are of validation documents, in the wordings for testing. Each row is written as
soon as it is there; rows that are there are not measured again.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from one_shot import load, measure_row, measured_rows, parser, probe, prune, save
from torch import Tensor

from sparse_prune import AttentionPruner, BlockStatistics, ConstantSchedule, Constraints
from sparse_prune.evaluation import all_connections
from sparse_prune.precision import fast_autocast
from sparse_prune.retrieval import (
    Retrieval,
    RetrievalProbe,
    far_field_influence,
    look_back,
    repeat_passages,
    retrieval_probes,
    strongest_heads,
    text_probes,
)

_UNASKED = "blocks by attention"


def main() -> None:
    """A row per way to ask and per share of whole heads."""
    tasks = ("passkey", "needle", "multi_query")
    options = parser(__doc__, probes=8, sequences=6, prompts=60, block_size=16, tasks=tasks)
    options.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.05])
    options.add_argument("--by", nargs="+", choices=["words", "tokens"], default=["words", "tokens"])
    arguments = options.parse_args()
    model, tokenizer, sequences = load(arguments)
    watcher = AttentionPruner(ConstantSchedule(final=0.5), block_size=arguments.block_size)
    watcher.attach(model)
    train, rows = sequences["train"], measured_rows(arguments)
    measure = partial(measure_row, arguments, model, tokenizer, sequences["val"])
    seen, asked = probe(watcher, model, train), dict[str, list[tuple[dict[str, BlockStatistics], str]]]()
    influence: dict[str, dict[str, Tensor]] = {}
    ways: list[tuple[str, str | None, float]] = [(_UNASKED, None, 0.0)]
    for by in arguments.by:
        for share in arguments.shares:
            heads = f", {share:.0%} of heads whole" if share else ""
            ways.append((f"{_UNASKED} and by questions in {by}{heads}", by, share))
    for sparsity in arguments.sparsities:
        for name, by, share in ways:
            if any((row["name"], row["asked"]) == (name, sparsity) for row in rows):
                continue
            if by is not None and by not in asked:
                count = Retrieval().probes
                questions = text_probes(tokenizer, train, count) if by == "words" else retrieval_probes(train, count)
                asked[by] = _looked_at(model, watcher, train, questions)
                if any(arguments.shares):
                    influence[by] = _influence(model, watcher, questions)
            whole = strongest_heads(influence[by], share) if by is not None and share else None
            pruner = prune(
                watcher, model, seen, sparsity, asked.get(by or "", ()), constraints=Constraints(protected_heads=whole)
            )
            rows.append(measure({"name": name, "asked": sparsity, "sparsity": pruner.total_sparsity}))
            save(arguments, rows)
    if not any(row["name"] == "dense" for row in rows):
        with all_connections(model):
            rows.append(measure({"name": "dense", "asked": 0.0, "sparsity": 0.0}))
        save(arguments, rows)


def _looked_at(
    model: Any, watcher: AttentionPruner, sequences: Tensor, questions: list[RetrievalProbe]
) -> list[tuple[dict[str, BlockStatistics], str]]:
    """What the model looks at in questions, and in passages that repeat."""
    layers = [state.layer for state in watcher.layers.values()]
    call, start = partial(model, use_cache=False), time.perf_counter()
    found = list(look_back(model, call, layers, questions, repeat_passages(sequences, 1), watcher.sides))
    print(f"looking at {len(questions) + len(sequences)} sequences: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def _influence(model: Any, watcher: AttentionPruner, questions: list[RetrievalProbe]) -> dict[str, Tensor]:
    layers = [state.layer for state in watcher.layers.values()]
    start = time.perf_counter()
    found = far_field_influence(
        model, lambda tokens: model(input_ids=tokens, use_cache=False).logits, layers, questions
    )
    print(f"influence on {len(questions)} sequences: {time.perf_counter() - start:.0f} s", flush=True)
    return found


if __name__ == "__main__":
    with fast_autocast("cpu"):
        main()
