"""What a pattern that still moves costs on a CPU: its kept blocks alone, or a token mask over all of SDPA.

    OMP_NUM_THREADS=1 python benchmarks/moving_backend.py --output benchmarks/results/moving_backend.json

Milliseconds of a forward and backward pass with random patterns, beside dense attention, and what
`sparse_prune.kernels.moving_backend` takes: this is what its costs were fitted to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import Rows

from sparse_prune.attention.layer import CallShape, PrunableAttention
from sparse_prune.attention.measure import time_attention
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import AttentionOptions, moving_backend
from sparse_prune.machine import describe_machine

CPU = torch.device("cpu")


class Call(NamedTuple):
    """An attention call; the defaults are those of a causal model in float32."""

    batch: int
    num_heads: int
    num_kv_heads: int
    length: int
    head_dim: int
    block_size: int
    causal: bool = True
    dtype: str = "float32"
    dropout_p: float = 0.0
    padded: bool = False


CALLS = {
    "MiniLM, blocks of 16": Call(16, 12, 12, 256, 32, 16, causal=False),
    "MiniLM": Call(4, 12, 12, 512, 32, 32, causal=False),
    "MiniLM, padded": Call(4, 12, 12, 512, 32, 32, causal=False, padded=True),
    "MiniLM, padded, dropout": Call(4, 12, 12, 512, 32, 32, causal=False, dropout_p=0.1, padded=True),
    "BERT-base, bfloat16": Call(4, 12, 12, 512, 64, 32, causal=False, dtype="bfloat16"),
    "ViT-tiny": Call(8, 3, 3, 197, 64, 16, causal=False),
    "SmolLM2, batch 8": Call(8, 9, 3, 512, 64, 16),
    "SmolLM2, batch 4, bfloat16": Call(4, 9, 3, 1024, 64, 64, dtype="bfloat16"),
    "SmolLM2, batch 1": Call(1, 9, 3, 2048, 64, 64),
    "SmolLM2, batch 1, bfloat16": Call(1, 9, 3, 2048, 64, 64, dtype="bfloat16"),
}


def measure(call: Call, density: float, repeats: int) -> dict[str, Any]:
    """One row: shares of pairs kept, times, the backend taken and what it takes above the fastest."""
    pattern = random_pattern(call.num_heads, call.length, call.block_size, density=density, causal=call.causal)
    padding = torch.ones(call.batch, call.length, dtype=torch.bool) if call.padded else None
    options = AttentionOptions(key_mask=padding, dropout_p=call.dropout_p, seed=0 if call.dropout_p else None)
    layer = PrunableAttention("layer", call.num_heads, call.num_kv_heads, call.causal)
    dtype = getattr(torch, call.dtype)
    layer.last_shape = CallShape(call.batch, call.length, call.length, call.head_dim, dtype, CPU, options)
    times = time_attention(layer, ["gather", "sdpa"], repeats, pattern=pattern)
    query = torch.empty(call.batch, call.num_heads, call.length, call.head_dim, dtype=dtype)
    chosen = moving_backend(query, pattern, options)
    return {
        "kept_pairs": round(pattern.kept_blocks / pattern.keep.numel(), 3),
        "milliseconds": {name: round(ms, 2) for name, ms in times.items()},
        "chosen": chosen,
        "above_fastest": round(times[chosen] / min(times["gather"], times["sdpa"]) - 1.0, 3),
    }


def main() -> None:
    """Parse arguments, measure, print and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.9, 0.7, 0.5, 0.3, 0.15])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file; rows in it are not measured again")
    given = parser.parse_args()
    kept = Rows(given.output, {"repeats": given.repeats}, describe_machine())
    done = {(row["call"], row["density"]) for row in kept.rows}
    for name, call in CALLS.items():
        for density in given.densities:
            if (name, density) not in done:
                row = measure(call, density, given.repeats)
                kept.add({"call": name, **call._asdict(), "density": density, **row})
                print(name, density, row, flush=True)


if __name__ == "__main__":
    main()
