"""What deciding costs beside the model: time per batch and decision, bytes between ranks, bytes in a checkpoint.

    OMP_NUM_THREADS=1 python benchmarks/decision_cost.py --output benchmarks/results/decision_cost.json

Statistics are drawn at random where a probe would collect them; no attention is computed. The default is 8 layers of 32
heads at 8192 tokens in blocks of 64. The ranks are processes of this machine over gloo. Times are of the processor, in
this process, not of the clock: other programs disturb them less, and waiting for other ranks does not count.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import AttentionPruner, BlockStatistics, LinearSchedule
from sparse_prune.machine import describe_machine

BLOCK = 64


def made_pruner(layers: int, heads: int) -> AttentionPruner:
    """A pruner of a model whose layers are never called."""
    sizes = {"vocab_size": 8, "hidden_size": 2 * heads, "intermediate_size": 8, "num_hidden_layers": layers}
    pruner = AttentionPruner(LinearSchedule(final=0.7, end_step=100), block_size=BLOCK)
    pruner.attach(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)))
    return pruner


def feed(pruner: AttentionPruner, blocks: int, generator: torch.Generator) -> None:
    """Put causal statistics where a probe leaves them."""
    for state in pruner.layers.values():
        shape = (3, state.layer.num_heads, blocks, blocks)
        sums = torch.rand(shape, generator=generator).double().tril()
        state.layer.statistics = BlockStatistics(sums, torch.ones(2, 1, blocks, 1, dtype=torch.float64))


def seconds(repeats: int, run: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> dict[str, float]:
    """Least and median processor time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        prepare()
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"least_seconds": min(times[1:]), "median_seconds": statistics.median(times[1:])}


def alone(layers: int, heads: int, blocks: int, repeats: int) -> dict[str, Any]:
    """Time of one process and bytes of its state."""
    pruner, generator = made_pruner(layers, heads), torch.Generator().manual_seed(0)
    steps = iter(range(10, 10**6, 10))
    decision = seconds(repeats, lambda: pruner.update(next(steps)), lambda: feed(pruner, blocks, generator))
    saved = io.BytesIO()
    torch.save(pruner.state_dict(), saved)
    return {
        "decision": decision,
        "batch": seconds(repeats, lambda: pruner.total_sparsity),
        "state_bytes": saved.tell(),
        "state": seconds(repeats, lambda: torch.save(pruner.state_dict(), io.BytesIO())),
    }


def one_rank(rank: int, ranks: int, folder: Path, layers: int, heads: int, blocks: int, repeats: int) -> None:
    """Add up statistics with the other ranks; rank 0 writes what it took."""
    from sparse_prune.distributed import sum_over_ranks

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    shape = (2, heads, blocks, blocks)
    counts = torch.ones(2, 1, blocks, 1, dtype=torch.float64)
    seen = {
        str(layer): BlockStatistics(torch.rand(shape, generator=generator).double(), counts, ("max", "mean"))
        for layer in range(layers)
    }
    found = seconds(repeats, lambda: sum_over_ranks(seen), dist.barrier)
    numbers = sum(part.sums.numel() + part.counts.numel() for part in seen.values())
    if rank == 0:
        sent = {"bytes_sent_per_rank": round(2 * (ranks - 1) / ranks * 4 * numbers)}
        (folder / "found.json").write_text(json.dumps({"ranks": ranks, **sent, **found}))
    dist.destroy_process_group()


def together(ranks: int, *sizes: int) -> dict[str, Any]:
    """Time and bytes of adding up statistics over ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (ranks, Path(folder), *sizes), ranks)
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def main() -> None:
    """Parse arguments, measure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=128, help="per side")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sizes = (arguments.layers, arguments.heads, arguments.blocks, arguments.repeats)
    result = {
        "layers": arguments.layers, "heads": arguments.heads, "blocks": arguments.blocks, "repeats": arguments.repeats,
        **describe_machine(), "alone": alone(*sizes),
        "together": together(arguments.ranks, *sizes) if arguments.ranks > 1 else None,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
