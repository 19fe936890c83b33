"""Stage a: every kernel once, at head_dim 64 and 128, against float64; run by `campaign.py`.

Output and gradients in bfloat16 and float16, the same bits a second time, the probe, decoding, and, on a GPU, no
synchronisation of the host in a warm call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import check
from gpu.session import DEVICE, about, dtypes
from rows import Rows
from torch import Tensor

from sparse_prune import BlockPattern, Influence, probe_blocks
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention, probe_score
from sparse_prune.kernels.triton.attend import decode, influence, probe

Call = tuple[tuple[Tensor, Tensor, Tensor], Tensor, BlockPattern]


def made(dim: int, dtype: torch.dtype, length: int, block: int) -> Call:
    """Query, key and value of two query heads a key head; a gradient; half of the blocks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, heads, length, dim, device=DEVICE, dtype=dtype, generator=generator) for heads in (4, 2, 2, 4)
    )
    tensors = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    return tensors, grad, random_pattern(4, length, block, density=0.5)  # type: ignore[return-value]


def results(call: Call) -> list[Tensor]:
    """Output and gradients."""
    tensors, grad, pattern = call
    output = block_sparse_attention(*tensors, pattern, backend="triton")
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def same_bits(call: Call) -> dict[str, float]:
    """Two runs of one call agree in every bit."""
    if not all(torch.equal(*pair) for pair in zip(results(call), results(call), strict=True)):
        raise ArithmeticError("a second run gives other bits")
    return {}


def close(found: Tensor, wanted: Tensor, least: float, limit: float) -> dict[str, float]:
    """The largest error as a share of the largest number wanted, or of `least`, if it is within the limit.

    Raises:
        ArithmeticError: If it is not.
    """
    error = float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=least))
    if not error <= limit:
        raise ArithmeticError(f"off by {error:.3g} of the largest, at most {limit:.3g} is allowed")
    return {"error": error}


def probes(call: Call) -> dict[str, float]:
    """The probe's sums, against those of torch in float64."""
    (query, key, _), _, pattern = call
    found = probe(query.detach(), key.detach(), pattern.block_size, causal=True).sums
    wanted = probe_blocks(query.detach().double(), key.detach().double(), pattern.block_size, causal=True).sums
    return close(found, wanted, 0.0, 1e-2)


def influences(call: Call) -> dict[str, float]:
    """The sums of `Influence`, of kept and pruned blocks, against those of torch in float64."""
    tensors, grad, pattern = call
    given = {"causal": True, "options": AttentionOptions(), "pattern": pattern}
    inputs = [tensor.detach() for tensor in tensors]
    found = influence(*inputs, grad, pattern.block_size, **given).sums
    exact = [tensor.double().cpu() for tensor in (*inputs, grad)]
    wanted = probe_score(Influence(), *exact[:3], pattern.block_size, gradient=exact[3], **given).sums.to(found.device)
    return close(found, wanted, 0.0, 2e-2)


def decodes(call: Call) -> dict[str, float]:
    """One token over the kept blocks, against the last row of the float64 reference."""
    (query, key, value), _, pattern = call
    exact = [tensor.detach().double() for tensor in (query, key, value)]
    wanted = block_sparse_attention(*exact, pattern, backend="reference")[:, :, -1:]
    found = decode(query.detach()[:, :, -1:], key.detach(), value.detach(), pattern, AttentionOptions())
    return close(found, wanted, 1.0, 8 * torch.finfo(query.dtype).eps)


def waits_for_nothing(call: Call) -> dict[str, float]:
    """A warm call, forward, backward, probe and decoding, never makes the host wait; torch raises where it does."""
    (query, key, value), grad, pattern = call
    query, key, value, options = query.detach(), key.detach(), value.detach(), AttentionOptions()
    given = {"causal": True, "options": options, "pattern": pattern}
    steps: list[Callable[[], object]] = [
        lambda: results(call),
        lambda: probe(query, key, pattern.block_size, causal=True),
        lambda: influence(query, key, value, grad, pattern.block_size, **given),
        lambda: decode(query[:, :, -1:], key, value, pattern, options),
    ]
    for step in steps:
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def main() -> None:
    """Check what the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1000, help="tokens; not a multiple of the block finds more")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    arguments = parser.parse_args()
    kept = Rows(arguments.output, {"length": arguments.length, "blocks": arguments.blocks}, about())
    checks: dict[str, Callable[[Call], dict[str, Any]]] = {
        "output and gradients": lambda call: check(*call), "same bits": same_bits, "probe": probes,
        "influence": influences, "decode": decodes,
    }  # fmt: skip
    if DEVICE == "cuda":
        checks["no synchronisation"] = waits_for_nothing
    done = {row["name"] for row in kept.rows}
    for dim in (64, 128):
        for dtype in dtypes():
            for block in arguments.blocks:
                call = made(dim, dtype, arguments.length, block)
                for name, run in checks.items():
                    label = f"{name}, d{dim} block {block} {str(dtype).removeprefix('torch.')}"
                    found = None if label in done else kept.attempt(label, partial(run, call))
                    if found is not None:
                        kept.add({"name": label, **found})
    kept.finish()


if __name__ == "__main__":
    main()
