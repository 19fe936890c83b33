"""Which statistic of row mass to prune by: loss and passkey accuracy after one-shot pruning, no fine-tuning.

    python benchmarks/score_statistics.py --output benchmarks/results/score_statistics.json

Scores come from training documents; loss is on validation documents, so the recipe's test documents stay unseen.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from one_shot import evaluate, parser, save
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.finetune.pretrained import load_tokenizer

from sparse_prune import ConstantSchedule
from sparse_prune.pruner import AttentionPruner
from sparse_prune.scores import STATISTICS


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, then one per statistic and sparsity."""
    counts = {"train_sequences": arguments.probes, "val_sequences": arguments.sequences}
    data = TextDataModule(arguments.model, context_length=arguments.length, test_sequences=1, **counts)
    data.setup("fit")
    model, tokenizer = load_model(arguments.model).eval(), load_tokenizer(arguments.model)
    rows: list[dict[str, Any]] = [
        {"statistic": "dense", "sparsity": 0.0, **evaluate(model, tokenizer, data.sequences["val"], arguments.prompts)}
    ]
    print(rows[-1], flush=True)
    watcher = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=arguments.block_size)
    watcher.attach(model)
    watcher.probe(True)
    with torch.no_grad():
        for sequence in data.sequences["train"]:
            model(input_ids=sequence[None], use_cache=False)
    watcher.probe(False)
    seen = {name: state.layer.take_statistics() for name, state in watcher.layers.items()}
    for statistic in STATISTICS:
        for sparsity in arguments.sparsities:
            pruner = replace(watcher, sparsity=ConstantSchedule(final=sparsity), statistic=statistic)
            pruner.attach(model)
            for name, state in pruner.layers.items():
                state.layer.pattern, state.layer.mode, state.layer.statistics = None, "dense", seen[name]
            pruner.update(step=1)
            found = evaluate(model, tokenizer, data.sequences["val"], arguments.prompts)
            rows.append({"statistic": statistic, "sparsity": pruner.total_sparsity, **found})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, write JSON."""
    options = parser(__doc__, probes=8, sequences=4, prompts=6)
    options.set_defaults(sparsities=[0.5, 0.6, 0.7])
    arguments = options.parse_args()
    with torch.autocast("cpu", torch.bfloat16):
        save(arguments, measure(arguments))


if __name__ == "__main__":
    main()
