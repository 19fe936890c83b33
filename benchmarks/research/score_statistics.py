"""Which statistic of row mass to prune by: loss and passkey accuracy after one-shot pruning, no fine-tuning.

    python benchmarks/research/score_statistics.py --output benchmarks/results/score_statistics.json

Scores come from training documents; loss is on validation documents, so the recipe's test documents stay unseen.
"""

from __future__ import annotations

import argparse
from typing import Any

from one_shot import evaluate, load, parser, probe, prune, save

from sparse_prune import ConstantSchedule, Constraints
from sparse_prune.precision import fast_autocast
from sparse_prune.pruner import AttentionPruner
from sparse_prune.scores import STATISTICS


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, then one per statistic and sparsity."""
    model, tokenizer, sequences = load(arguments)
    rows: list[dict[str, Any]] = [
        {"statistic": "dense", "sparsity": 0.0, **evaluate(model, tokenizer, sequences["val"], arguments.prompts)}
    ]
    print(rows[-1], flush=True)
    alone = Constraints(share_diagonals=0.0)
    watcher = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=arguments.block_size, constraints=alone)
    watcher.attach(model)
    seen = probe(watcher, model, sequences["train"])
    for statistic in STATISTICS:
        for sparsity in arguments.sparsities:
            pruner = prune(watcher, model, seen, sparsity, statistic=statistic)
            found = evaluate(model, tokenizer, sequences["val"], arguments.prompts)
            rows.append({"statistic": statistic, "sparsity": pruner.total_sparsity, **found})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, write JSON."""
    options = parser(__doc__, probes=8, sequences=4, prompts=6)
    options.set_defaults(sparsities=[0.5, 0.6, 0.7])
    arguments = options.parse_args()
    with fast_autocast("cpu"):
        save(arguments, measure(arguments))


if __name__ == "__main__":
    main()
