"""What constraints cost and what they save: loss, passkey accuracy and KV cache after one-shot pruning, no fine-tuning.

    python benchmarks/research/constraints.py --output benchmarks/results/constraints.json

Scores come from training documents, loss from validation documents. The size of the KV cache is what `PatternCache`
holds after the prompt, a share of all key blocks per KV head.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from one_shot import evaluate, load, parser, probe, prune, save

from sparse_prune import AttentionPruner, BlockStatistics, ConstantSchedule, Constraints
from sparse_prune.export import save_pretrained
from sparse_prune.precision import fast_autocast
from sparse_prune.retrieval import Retrieval, far_field_influence, strongest_heads, text_probes


def variants(protected: dict[str, tuple[int, ...]]) -> dict[str, Constraints]:
    """Name -> constraints to compare."""
    alone: dict[str, Any] = {"share_diagonals": 0.0}
    groups = alone | {"share_kv_groups": True}
    bands = groups | {"share_diagonals": 1.0}
    protect = {"protected_heads": protected}
    return {
        "none": Constraints(**alone),
        "groups": Constraints(**groups),
        "price 30": Constraints(**alone, reach_price=30.0),
        "diagonals, half": Constraints(share_diagonals=0.5),
        "diagonals": Constraints(share_diagonals=1.0),
        "groups, price 3": Constraints(**groups, reach_price=3.0),
        "groups, price 30": Constraints(**groups, reach_price=30.0),
        "groups, diagonals": Constraints(**bands),
        "groups, diagonals, price 3": Constraints(**bands, reach_price=3.0),
        "groups, diagonals, price 3, filled": Constraints(**bands, reach_price=3.0, fill_reach=True),
        "retrieval heads protected": Constraints(**alone, **protect),
        "groups, diagonals, price 3, retrieval heads protected": Constraints(**bands, reach_price=3.0, **protect),
    }


def kv_share(pruner: AttentionPruner, length: int) -> float:
    """Share of the KV cache that is held after `length` tokens."""
    held = possible = 0
    for state in pruner.layers.values():
        layer = state.layer
        assert layer.pattern is not None
        needed = torch.unflatten(layer.pattern.needed_after(length), 0, (layer.num_kv_heads, -1)).any(1)
        held, possible = held + int(needed.sum()), possible + needed.numel()
    return held / possible


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the dense model, then one per variant and sparsity."""
    model, tokenizer, sequences = load(arguments)
    watcher = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=arguments.block_size)
    watcher.attach(model)
    seen = _statistics(watcher, model, sequences["train"], arguments.statistics)
    wanted = arguments.only or list(variants({}))
    protected: dict[str, tuple[int, ...]] = {}
    if any("retrieval" in name for name in wanted):
        protected = _retrieval_heads(model, tokenizer, watcher, sequences["train"], arguments.protected_share)
    found = evaluate(model, tokenizer, sequences["val"], arguments.prompts)
    rows: list[dict[str, Any]] = [
        {"constraints": "dense", "sparsity": 0.0, "kv_share": 1.0, "kv_share_4x": 1.0, **found}
    ]
    print(rows[-1], flush=True)
    for name, constraints in variants(protected).items():
        if name not in wanted:
            continue
        for sparsity in arguments.sparsities:
            pruner = prune(watcher, model, seen, sparsity, constraints=constraints)
            shares = {
                "kv_share": kv_share(pruner, arguments.length),
                "kv_share_4x": kv_share(pruner, 4 * arguments.length),
            }
            found = evaluate(model, tokenizer, sequences["val"], arguments.prompts)
            rows.append({"constraints": name, "sparsity": pruner.total_sparsity, **shares, **found})
            print(rows[-1], flush=True)
            if arguments.export:
                folder = arguments.export / f"{name.replace(' ', '_')}_{sparsity:g}"
                save_pretrained(model, folder, pruner=pruner, tokenizer=tokenizer)
    return rows


def _retrieval_heads(
    model: Any, tokenizer: Any, watcher: AttentionPruner, sequences: torch.Tensor, share: float
) -> dict[str, tuple[int, ...]]:
    """The heads whose far field the answers to questions hang on most."""

    def call(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    layers = [state.layer for state in watcher.layers.values()]
    influence = far_field_influence(model, call, layers, text_probes(tokenizer, sequences, Retrieval().probes))
    return strongest_heads(influence, share)


def _statistics(
    watcher: AttentionPruner, model: Any, sequences: torch.Tensor, file: Path | None
) -> dict[str, BlockStatistics]:
    """Of every layer over the sequences; from the file if it is there, else into it if it is given."""
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        return {name: BlockStatistics(sums, counts) for name, (sums, counts) in saved.items()}
    seen = probe(watcher, model, sequences)
    if file is not None:
        torch.save({name: (part.sums, part.counts) for name, part in seen.items()}, file)
    return seen


def main() -> None:
    """Parse arguments, measure, write JSON."""
    options = parser(__doc__, probes=8, sequences=4, prompts=6)
    options.add_argument("--only", nargs="+", help="names of variants; default: all")
    options.add_argument("--protected-share", type=float, default=0.05, help="of all heads, those that retrieve most")
    options.add_argument("--statistics", type=Path, help="file to keep the scores in, for the next run")
    options.add_argument("--export", type=Path, help="folder to export every variant's model to")
    arguments = options.parse_args()
    with fast_autocast("cpu"):
        save(arguments, measure(arguments), without=("export", "statistics"))


if __name__ == "__main__":
    main()
