"""Block-sparse attention on a GPU: Triton kernels against dense SDPA and FlexAttention, checked, then timed.

    python benchmarks/attention.py --output benchmarks/results/attention_gpu.json

Batch 1, causal, random patterns beside sink and diagonal; a sparsity that these two forbid at a length is left out.
Launch configurations are found first (`--tune`), then outputs and gradients are checked with them, then the clock runs.
Rows are kept as they come and a command that was broken off goes on; what fails, for want of memory say, takes nothing
else along. Every row gives three ratios: against our own kernel at full density, against the
fastest dense SDPA that the device has, and against compiled FlexAttention with the same mask; and the time of the probe
and of decoding one token. "ideal" is the kept share of blocks: fraction of ideal 1.0 means that pruned blocks cost
nothing. Without a GPU it runs in Triton's
interpreter at the lengths asked for, which checks the kernels and this script; its times then mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import agreement
from rows import Rows
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_prune import BlockPattern
from sparse_prune.fixed_patterns import random_pattern
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
        except RuntimeError as error:  # no such kernel, or not enough memory for it
            print(f"  {backend.name}: not available ({str(error).splitlines()[0][:90]})")
    return found


def sparse_times(
    backend: str, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, pattern: BlockPattern
) -> dict[str, float]:
    """One of our backends; "flex" is compiled FlexAttention with the same blocks."""
    attend = partial(block_sparse_attention, query, key, value, pattern, backend=backend)
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


def check(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, pattern: BlockPattern) -> bool:
    """Output and gradients against the float64 reference, with SDPA's own error on the same mask as the measure.

    Raises:
        SystemExit: If the kernels are wrong: their times would mean nothing.
    """
    try:
        agreement.check((query, key, value), grad, pattern)
    except ArithmeticError as error:
        raise SystemExit(f"WRONG at {tuple(query.shape)}, {pattern.sparsity:.0%}: {error}") from error
    return True


def reachable(arguments: argparse.Namespace, length: int) -> dict[float, BlockPattern]:
    """Patterns by the sparsity asked for, without those that sink and diagonal forbid."""
    found = {}
    for sparsity in arguments.sparsities:
        pattern = random_pattern(arguments.heads, length, arguments.block, density=1.0 - sparsity)
        if pattern.sparsity > sparsity - 0.02:
            found[sparsity] = pattern
        else:
            print(f"{length:6d} {sparsity:4.0%}: left out, sink and diagonal allow {pattern.sparsity:.0%} at most")
    return found


def measure(arguments: argparse.Namespace, kept: Rows) -> None:
    """Two rows per shape and sparsity: forward, and forward with backward."""
    done = {(row["length"], row["head_dim"], row["group"], row["asked"]) for row in kept.rows}
    for length in arguments.lengths:
        patterns = reachable(arguments, length)
        for dim, group in itertools.product(arguments.head_dims, arguments.groups):
            missing = {asked: p for asked, p in patterns.items() if (length, dim, group, asked) not in done}
            if missing:
                label = f"{length} d{dim} g{group}"
                kept.attempt(label, partial(measure_shape, arguments, kept, label, length, dim, group, missing))


def measure_shape(
    arguments: argparse.Namespace,
    kept: Rows,
    label: str,
    length: int,
    dim: int,
    group: int,
    patterns: dict[float, BlockPattern],
) -> None:
    """Rows of one shape, by the sparsity asked for."""
    on_gpu, heads = torch.cuda.is_available(), arguments.heads
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float16)
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, h, length, dim, device=device, dtype=dtype, generator=generator, requires_grad=True)
        for h in (heads, heads // group, heads // group)
    )
    grad = torch.randn(query.shape, device=device, dtype=dtype, generator=generator)
    tensors = (query, key, value, grad)
    everything = random_pattern(heads, length, arguments.block, density=1.0)
    if on_gpu and arguments.tune:
        for pattern in patterns.values():  # calls that are alike are measured once
            kept.attempt(f"{label} tuning", partial(tune, query, key, value, pattern))
    checked = length <= CHECKED_UP_TO and all(
        kept.attempt(f"{label} check", partial(check, *tensors, pattern))
        for pattern in (everything, *patterns.values())
    )
    own = sparse_times("triton", *tensors, everything)
    dense = dense_times(*tensors)
    probed = milliseconds(lambda: probe(query.detach(), key.detach(), everything.block_size, causal=True))
    for sparsity, pattern in patterns.items():
        at = f"{label} {sparsity:.0%}"
        ours = kept.attempt(f"{at} triton", partial(sparse_times, "triton", *tensors, pattern))
        if ours is None:
            continue
        flex = kept.attempt(f"{at} flex", partial(sparse_times, "flex", *tensors, pattern)) if on_gpu else None
        decoding = kept.attempt(f"{at} decoding", partial(decode_times, query, key, value, pattern))
        share, rows = 1.0 - pattern.sparsity, []
        for part in ("forward", "both"):
            best = min(dense, key=lambda name: dense[name][part], default=None)
            rows.append(
                {
                    "length": length, "head_dim": dim, "group": group, "asked": sparsity, "sparsity": pattern.sparsity,
                    "pass": part, "checked": checked,
                    "dense": {name: times[part] for name, times in dense.items()}, "best_dense": best,
                    "ours_dense_ms": own[part], "ours_ms": ours[part], "flex_ms": flex and flex[part],
                    "probe_ms": probed, "ideal_of_own": share * own[part] / ours[part],
                    "ideal_of_dense": best and share * dense[best][part] / ours[part],
                    "flex_over_ours": flex and flex[part] / ours[part], "decode": decoding,
                }
            )  # fmt: skip
            print(table_row(rows[-1]), flush=True)
        kept.add(*rows)


def table_row(row: dict[str, Any]) -> str:
    """One line of the table that is printed; "-" where something failed or is not there."""

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    best, decoding = row["best_dense"], row["decode"] or {}
    return (
        f"{row['length']:6d} d{row['head_dim']:<3d} g{row['group']} {row['sparsity']:4.0%} {row['pass']:7s} "
        f"ours {row['ours_ms']:8.3f} ms, own dense {row['ours_dense_ms']:8.3f}, {best or 'no dense'} "
        f"{number(row['dense'].get(best))}; of ideal: own {row['ideal_of_own']:.2f}, dense "
        f"{number(row['ideal_of_dense'], 2)}; flex / ours {number(row['flex_over_ours'], 2)}; probe "
        f"{row['probe_ms']:.3f} ms; decode {number(decoding.get('ours_ms'))} of {number(decoding.get('dense_ms'))} ms"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Fraction of ideal against length, forward and backward, a line per sparsity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="fraction of ideal, against best dense SDPA", xscale="log")
    shape = (rows[0]["head_dim"], rows[0]["group"])
    first = [row for row in rows if row["pass"] == "both" and (row["head_dim"], row["group"]) == shape]
    first = sorted((row for row in first if row["ideal_of_dense"] is not None), key=lambda row: row["length"])
    for sparsity in sorted({row["asked"] for row in first}):
        points = [row for row in first if row["asked"] == sparsity]
        axes.plot([p["length"] for p in points], [p["ideal_of_dense"] for p in points], "o-", label=f"{sparsity:.0%}")
    axes.legend(title="sparsity")
    figure.savefig(path, dpi=120)


def commit() -> str:
    """The code that was measured; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Parse arguments, measure what is missing in the output, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4], help="query heads per key head")
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--tune", action="store_true", help="measure launch configurations first")
    parser.add_argument(
        "--output", type=Path, help="JSON file; rows in it are not measured again; a plot is written beside it"
    )
    arguments = parser.parse_args()
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, interpreted: times mean nothing"
    setup = {"heads": arguments.heads, "block": arguments.block, "tune": arguments.tune, "device": device}
    setup |= {"torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    try:
        kept = Rows(arguments.output, setup)
    except ValueError as error:
        parser.error(str(error))
    measure(arguments, kept)
    if arguments.output and kept.rows and find_spec("matplotlib") is None:
        print("No plot is drawn: matplotlib is not installed. The same command draws it where it is.")
    elif arguments.output and kept.rows:
        draw(kept.rows, arguments.output.with_suffix(".png"))
    kept.finish()


if __name__ == "__main__":
    main()
