"""Stage b: random calls in bfloat16 and float16, output and gradients against float64; run by `campaign.py`.

Lengths, blocks, groups, head sizes, masks, windows, documents, soft caps and dropout are drawn, each case from its own
number: `--first N --seconds 0` runs case N again. Dropout drops the reference's weights, or the case fails.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from agreement import check
from gpu.session import DEVICE, about, dtypes
from rows import Rows
from torch import Tensor

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.triton import tables
from sparse_prune.pattern import num_blocks

PER_ROW = 20
"""Cases that one row of the output counts."""


class Draws:
    """Numbers of one case."""

    def __init__(self, case: int) -> None:
        self.generator = torch.Generator().manual_seed(case)

    def one(self, *choices: Any) -> Any:
        """One of them."""
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def true(self, share: float, *shape: int) -> Tensor:
        """Booleans of which about `share` are true."""
        return torch.rand(shape, generator=self.generator) < share


def options_of(draws: Draws, batch: int, q_len: int, kv_len: int, causal: bool) -> AttentionOptions:
    """About every fourth case has any one of them."""
    found: dict[str, Any] = {}
    if draws.true(0.25):
        found["key_mask"] = (torch.arange(kv_len) < draws.between(1, kv_len)).expand(batch, kv_len)
    if draws.true(0.25):
        found["attn_mask"] = draws.true(0.7, 1, 1, q_len, kv_len)
    if draws.true(0.25) and q_len == kv_len:
        found["documents"] = torch.arange(kv_len).expand(batch, kv_len) // draws.between(8, 64)
    if draws.true(0.25) and causal:
        found["window"] = draws.between(1, kv_len)
    if draws.true(0.25):
        found["softcap"] = draws.one(2.0, 30.0)
    if draws.true(0.25):
        found["dropout_p"], found["seed"] = draws.one(0.1, 0.5), draws.between(0, 2**40)
    return AttentionOptions(**found).with_masks(lambda mask: mask.contiguous().to(DEVICE))


def run(case: int, longest: int) -> dict[str, float]:
    """Draw a case and check it; what fails says its call."""
    draws = Draws(case)
    causal, batch, group, kv_heads = bool(draws.true(0.6)), draws.one(1, 2), draws.one(1, 2, 4), draws.one(1, 2)
    dim, dtype = draws.one(16, 64, 80, 128), draws.one(*dtypes())
    block = draws.one((16, 16), (32, 32), (64, 64), (128, 128), (64, 128), (128, 64))
    q_len = draws.between(1, longest)
    kv_len = q_len if draws.true(0.6) else draws.between(q_len if causal else 1, longest)
    heads = group * kv_heads
    keep = draws.true(draws.one(0.1, 0.5, 1.0), heads, num_blocks(q_len, block[0]), num_blocks(kv_len, block[1]))
    pattern = BlockPattern(keep, block, causal, q_len, kv_len)
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (heads, q_len))
    query, key, value, grad = (
        torch.randn(batch, *shape, dim, generator=draws.generator).to(DEVICE, dtype) for shape in shapes
    )
    options = options_of(draws, batch, q_len, kv_len, causal)
    # So few tokens make few programs: only as if on one processor do the query heads of a group share one.
    processors = 1 if draws.true(0.5) else tables.processors(torch.device(DEVICE))
    try:
        with mock.patch.object(tables, "processors", return_value=processors):
            return check((query, key, value), grad, pattern, options, eager="reference")
    except Exception as error:
        given = [name for name, value in vars(options).items() if value is not None]
        call = f"{tuple(query.shape)} {tuple(key.shape)} {dtype} {block} {causal=} {given}"
        raise ArithmeticError(f"{type(error).__name__}: {error}; {call}") from error


def main() -> None:
    """Run cases until the time is over, from the first that the output does not count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of a new output")
    parser.add_argument("--longest", type=int, default=600, help="tokens")
    arguments = parser.parse_args()
    kept = Rows(arguments.output, {"longest": arguments.longest, "first": arguments.first}, about())
    case = arguments.first + sum(row["cases"] for row in kept.rows)
    start = time.monotonic()
    while True:
        numbers = range(case, case + (PER_ROW if arguments.seconds else 1))
        found = {n: kept.attempt(f"case {n}", partial(run, n, arguments.longest)) for n in numbers}
        failed = [number for number, shares in found.items() if shares is None]
        worst = max((share for shares in found.values() if shares for share in shares.values()), default=None)
        kept.add({"first": case, "cases": len(numbers), "failed": failed, "worst": worst})
        case = numbers.stop
        if time.monotonic() - start >= arguments.seconds:
            break
    failed = [case for row in kept.rows for case in row["failed"]]
    count, worst = sum(row["cases"] for row in kept.rows), max((row["worst"] or 0.0 for row in kept.rows), default=0.0)
    print(f"summary: {count} cases, {len(failed)} failed, worst of the others {worst:.2f} of what is allowed")
    if failed:
        raise SystemExit(f"`--first N --seconds 0` and another output run one of them again: {failed}")


if __name__ == "__main__":
    main()
