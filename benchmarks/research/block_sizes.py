"""Which block size: loss, passkeys and time of attention after one-shot pruning, no fine-tuning.

    python benchmarks/research/block_sizes.py --output benchmarks/results/block_sizes.json

Scores come from training documents; loss is on validation documents, so the recipe's test documents stay unseen. Time
is that of attention alone, forward and backward, summed over the model's layers, each with its own pattern.
"""

from __future__ import annotations

import argparse
from typing import Any

from one_shot import evaluate, load, parser, probe, prune, save

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.attention import detach
from sparse_prune.attention.measure import time_attention
from sparse_prune.precision import fast_autocast

SIZES = (16, 32, 64, 128)


def attention_ms(pruner: AttentionPruner) -> dict[str, float]:
    """Milliseconds of all layers' attention, dense and by `gather`, for a call like the latest probed one."""
    times = [time_attention(state.layer, ["gather"]) for state in pruner.layers.values()]
    return {f"{name}_ms": sum(found[name] for found in times) for name in ("dense", "gather")}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, then one per block size and sparsity."""
    model, tokenizer, sequences = load(arguments)
    rows: list[dict[str, Any]] = [
        {"block_size": None, "sparsity": 0.0, **evaluate(model, tokenizer, sequences["val"], arguments.prompts)}
    ]
    print(rows[-1], flush=True)
    for size in arguments.block_sizes:
        watcher = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=size)
        detach(model)  # the size before left its patterns
        watcher.attach(model)
        seen = probe(watcher, model, sequences["train"])
        for sparsity in arguments.sparsities:
            pruner = prune(watcher, model, seen, sparsity)
            row = {"block_size": size, "sparsity": pruner.total_sparsity}
            row |= evaluate(model, tokenizer, sequences["val"], arguments.prompts)
            rows.append(row | attention_ms(pruner))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Parse arguments, measure, write JSON."""
    options = parser(__doc__, probes=8, sequences=4, prompts=6, block_size=None)
    options.add_argument("--block-sizes", type=int, nargs="+", default=SIZES, help="tokens per block side")
    options.set_defaults(sparsities=[0.6, 0.7])
    arguments = options.parse_args()
    with fast_autocast("cpu"):
        save(arguments, measure(arguments))


if __name__ == "__main__":
    main()
