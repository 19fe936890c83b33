"""Time block-sparse attention on a CPU against dense SDPA and SDPA with the equivalent boolean mask.

python benchmarks/attention_cpu.py --output benchmarks/results/attention_cpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import block_sparse_attention
from sparse_prune.machine import describe_machine
from sparse_prune.precision import fast_dtype

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
"""SmolLM2-135M's."""


def milliseconds(attend: Callable[[], Tensor], inputs: tuple[Tensor, ...], backward: bool, repeats: int) -> float:
    """Median of `repeats` runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = attend()
        if backward:
            torch.autograd.grad(output, inputs, torch.ones_like(output))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(length: int, block: int, sparsity: float, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """One row of the table; checks the output before it times anything."""
    generator = torch.Generator().manual_seed(1)

    def random(heads: int) -> Tensor:
        shape = (1, heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    inputs = query, key, value = random(HEADS), random(KV_HEADS), random(KV_HEADS)
    pattern = random_pattern(HEADS, length, block, density=1.0 - sparsity)
    mask, group = pattern.token_mask(length, length)[None], HEADS // KV_HEADS

    def dense(**how: Any) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), **how
        )

    def gather() -> Tensor:
        return block_sparse_attention(query, key, value, pattern, backend="gather")

    torch.testing.assert_close(gather(), dense(attn_mask=mask), atol=2e-2, rtol=2e-2)
    rivals = {"causal": lambda: dense(is_causal=True), "masked": lambda: dense(attn_mask=mask), "gather": gather}
    row: dict[str, Any] = {
        "length": length,
        "block": block,
        "sparsity": round(pattern.sparsity, 4),
        "dtype": str(dtype),
    }
    for name, attend in rivals.items():
        row[f"{name}_forward_ms"] = milliseconds(attend, inputs, False, repeats)
        row[f"{name}_both_ms"] = milliseconds(attend, inputs, True, repeats)
    return row


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7, 0.9])
    types = dict.fromkeys(("float32", str(fast_dtype(torch.bfloat16, "cpu")).removeprefix("torch.")))
    parser.add_argument("--dtypes", nargs="+", default=list(types), help="default: what this CPU multiplies fast")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    names = ("causal", "masked", "gather")
    print(
        "| dtype | length | block | sparsity | " + " | ".join(f"{n} f / f+b ms" for n in names) + " | vs causal f+b |"
    )
    print("| --- " * 8 + "|")
    for dtype, length, block, sparsity in itertools.product(args.dtypes, args.lengths, args.blocks, args.sparsities):
        row = measure(length, block, sparsity, getattr(torch, dtype), args.repeats)
        rows.append(row)
        times = " | ".join(f"{row[f'{n}_forward_ms']:.1f} / {row[f'{n}_both_ms']:.1f}" for n in names)
        gain = row["causal_both_ms"] / row["gather_both_ms"]
        print(f"| {dtype} | {length} | {block} | {row['sparsity']:.2f} | {times} | {gain:.2f}x |", flush=True)
    if args.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"command": " ".join(sys.argv), "commit": commit, **describe_machine(), "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
