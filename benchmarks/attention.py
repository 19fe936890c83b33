"""Block-sparse attention on a GPU: Triton kernels against dense SDPA and FlexAttention, checked, then timed.

    python benchmarks/attention.py --output benchmarks/results/attention_gpu.json

Batch 1, causal, random patterns. Every row gives three ratios: against our own kernel at full density, against the
fastest dense SDPA that the device has, and against compiled FlexAttention with the same mask; and the time of the
probe and of decoding one token. "ideal" is the kept
share of blocks: fraction of ideal 1.0 means that pruned blocks cost nothing. Without a GPU it runs in Triton's
interpreter at the lengths asked for, which checks the kernels and this script; its times then mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from sparse_prune.kernels.triton.attend import decode, probe
from sparse_prune.kernels.triton.tuning import tune

DENSE = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CHECKED_UP_TO = 4096
"""Tokens: the reference materialises all weights."""


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=200, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def timed(attend: Callable[[], Tensor], tensors: tuple[Tensor, ...], grad: Tensor) -> dict[str, float]:
    """Forward, and forward with backward."""
    attend()  # compile
    forward = milliseconds(attend)
    return {"forward": forward, "both": milliseconds(lambda: torch.autograd.grad(attend(), tensors, grad))}


def random_pattern(heads: int, length: int, block: int, sparsity: float) -> BlockPattern:
    """Causal, diagonal kept, `sparsity` of the possible blocks pruned."""
    dense = BlockPattern.dense(heads, length, length, block, causal=True)
    scores = torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(0))
    scores[:, torch.eye(scores.shape[1], dtype=torch.bool)] = 2.0
    allowed = scores[:, dense.possible]
    cut = allowed.flatten().kthvalue(max(1, int(sparsity * allowed.numel()))).values
    return BlockPattern(scores > cut if sparsity else dense.keep, (block, block), True, length, length)


def dense_times(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> dict[str, dict[str, float]]:
    """Every dense backend that takes the call."""
    found = {}
    enable_gqa = query.shape[1] != key.shape[1]
    for backend in DENSE:
        if backend == SDPBackend.MATH and query.shape[2] > CHECKED_UP_TO:
            continue

        def attend(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)

        try:
            found[backend.name] = timed(attend, (query, key, value), grad)
        except RuntimeError as error:
            print(f"  {backend.name}: not available ({str(error).splitlines()[0][:90]})")
    return found


def sparse_times(
    backend: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, pattern: BlockPattern
) -> dict[str, float]:
    """One of our backends; "flex" is compiled FlexAttention with the same blocks."""

    def attend() -> Tensor:
        return block_sparse_attention(query, key, value, pattern, backend=backend)

    return timed(attend, (query, key, value), grad)


def decode_times(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> dict[str, float]:
    """One token against the whole cache: dense SDPA, and our kernel over the kept blocks."""
    last = query[:, :, -1:].detach()
    key, value, options = key.detach(), value.detach(), AttentionOptions()
    gqa = query.shape[1] != key.shape[1]
    kept = pattern.keep[:, -1:]
    union = kept.view(key.shape[1], -1, kept.shape[2]).any(1)
    return {
        "dense_ms": milliseconds(lambda: F.scaled_dot_product_attention(last, key, value, enable_gqa=gqa)),
        "ours_ms": milliseconds(lambda: decode(last, key, value, pattern, options)),
        "union_density": float(union.float().mean()),
    }


def check(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern) -> None:
    """Against the float64 reference, with SDPA's own error on the same mask as the measure."""
    exact = block_sparse_attention(query.double(), key.double(), value.double(), pattern, backend="reference")
    ours = block_sparse_attention(query, key, value, pattern, backend="triton").double()
    eager = block_sparse_attention(query, key, value, pattern, backend="sdpa").double()
    allowed = 3 * (eager - exact).abs().max() + 4 * torch.finfo(query.dtype).eps
    if not (ours - exact).abs().max() <= allowed:
        raise SystemExit(f"WRONG RESULT at {tuple(query.shape)}: {(ours - exact).abs().max()} > {allowed}")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per shape and sparsity."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    rows = []
    for length, dim, group in itertools.product(arguments.lengths, arguments.head_dims, arguments.groups):
        heads = arguments.heads
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(1, h, length, dim, device=device, dtype=dtype, generator=generator, requires_grad=True)
            for h in (heads, heads // group, heads // group)
        )
        grad = torch.randn(query.shape, device=device, dtype=dtype, generator=generator)
        dense = dense_times(query, key, value, grad)
        tensors = (query, key, value, grad)
        own = sparse_times("triton", *tensors, random_pattern(heads, length, arguments.block, 0.0))
        sides = (arguments.block, arguments.block)
        probed = milliseconds(lambda q=query, k=key, s=sides: probe(q.detach(), k.detach(), s, causal=True))
        for sparsity in arguments.sparsities:
            pattern = random_pattern(heads, length, arguments.block, sparsity)
            if length <= CHECKED_UP_TO:
                check(query, key, value, pattern)
            if device == "cuda" and arguments.tune:
                tune(query, key, value, pattern)
            ours = sparse_times("triton", *tensors, pattern)
            flex = sparse_times("flex", *tensors, pattern) if device == "cuda" else None
            decoding = decode_times(query, key, value, pattern)
            for part in ("forward", "both"):
                best = min(dense, key=lambda name: dense[name][part])
                kept = 1.0 - pattern.sparsity
                rows.append(
                    {
                        "length": length, "head_dim": dim, "group": group, "sparsity": pattern.sparsity, "pass": part,
                        "dense": {name: times[part] for name, times in dense.items()}, "best_dense": best,
                        "ours_dense_ms": own[part], "ours_ms": ours[part], "flex_ms": flex and flex[part],
                        "probe_ms": probed, "ideal_of_own": kept * own[part] / ours[part],
                        "ideal_of_dense": kept * dense[best][part] / ours[part],
                        "flex_over_ours": flex and flex[part] / ours[part], "decode": decoding,
                    }
                )  # fmt: skip
                print(table_row(rows[-1]), flush=True)
    return rows


def table_row(row: dict[str, Any]) -> str:
    """One line of the table that is printed."""
    flex = "-" if row["flex_over_ours"] is None else f"{row['flex_over_ours']:.2f}"
    return (
        f"{row['length']:6d} d{row['head_dim']:<3d} g{row['group']} {row['sparsity']:4.0%} {row['pass']:7s} "
        f"ours {row['ours_ms']:8.3f} ms, own dense {row['ours_dense_ms']:8.3f}, {row['best_dense']} "
        f"{row['dense'][row['best_dense']]:8.3f}; of ideal: own {row['ideal_of_own']:.2f}, dense "
        f"{row['ideal_of_dense']:.2f}; flex / ours {flex}; probe {row['probe_ms']:.3f} ms; decode "
        f"{row['decode']['ours_ms']:.3f} of {row['decode']['dense_ms']:.3f} ms"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Fraction of ideal against length, forward and backward, a line per sparsity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="fraction of ideal, against best dense SDPA", xscale="log")
    first = [row for row in rows if row["pass"] == "both" and row["head_dim"] == rows[0]["head_dim"]]
    for sparsity in sorted({round(row["sparsity"], 2) for row in first}):
        points = [row for row in first if round(row["sparsity"], 2) == sparsity and row["group"] == rows[0]["group"]]
        axes.plot([p["length"] for p in points], [p["ideal_of_dense"] for p in points], "o-", label=f"{sparsity:.0%}")
    axes.legend(title="sparsity")
    figure.savefig(path, dpi=120)


def commit() -> str:
    """The code that was measured; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Parse arguments, measure, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4], help="query heads per key head")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--tune", action="store_true", help="measure launch configurations first")
    parser.add_argument("--output", type=Path, help="JSON file; a plot is written beside it")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.output:
        import triton

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, interpreted: times mean nothing"
        setup = {k: v for k, v in vars(arguments).items() if k != "output"}
        setup |= {"device": device, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"setup": setup, "rows": rows}, indent=1) + "\n")
        draw(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
