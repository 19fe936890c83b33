"""What the mask-free loops of the shipped configurations ask of a Hopper, counted in the machine code, without a GPU.

    python benchmarks/gpu/instruction_model.py --output benchmarks/results/instruction_model.json

Per turn of a loop: cycles in which the tensor cores multiply, and cycles in which one of the four schedulers of a
processor issues the turn's instructions. Where issuing takes longer than multiplying, no tuning of the memory hides it.
It is a model: it knows neither latencies nor caches, and says nothing of milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from ahead_of_time import TRAINING, Case, compiled
from rows import Rows

FLOPS_PER_CYCLE = 4096
"""Of bfloat16 on one processor of an H100: 989.4e12 / 132 processors / 1.83e9 cycles."""
SCHEDULERS = 4
"""Of one processor; each issues one instruction a cycle."""
SPECIAL_FUNCTION_CYCLES = 8
"""That an instruction of a warp occupies the 4 units of a scheduler: exp2."""
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}
"""Multiplications of tiles that a turn cannot do without."""


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text, without the predicate, of every instruction."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?(.*?);", text, re.MULTILINE)
    return [(int(address, 16), code.strip()) for address, code in found]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops that multiply on tensor cores, in order."""
    jumps = [(int(target[1], 16), place) for place, text in code if (target := re.match(r"BRA .*0x([0-9a-f]+)", text))]
    bodies = {(first, last): [text for place, text in code if first <= place <= last] for first, last in jumps}
    multiply = {span: body for span, body in bodies.items() if any(text.startswith("HGMMA") for text in body)}
    return [
        body
        for (first, last), body in sorted(multiply.items())
        if not any((first, last) != other and first <= other[0] and other[1] <= last for other in multiply)
    ]


def cycles(body: list[str], warps: int) -> dict[str, int]:
    """Of one turn: tensor cores, schedulers, and the units for exp2."""
    flops = sum(2 * m * n * k for text in body for m, n, k in (_sides(text),))
    counts = Counter(re.split(r"[. ]", text)[0] for text in body)
    # Four warps make one product of a warp group; each scheduler has every fourth warp.
    return {
        "tensor": round(flops * warps / 4 / FLOPS_PER_CYCLE),
        "issue": (len(body) - counts["NOP"]) * warps // SCHEDULERS,
        "exp2": counts["MUFU"] * SPECIAL_FUNCTION_CYCLES * warps // SCHEDULERS,
    }


def _sides(text: str) -> tuple[int, int, int]:
    found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


def model(case: Case) -> dict[str, Any]:
    """One row: the configuration, and the cycles of the loop without masks, which issues least."""
    kernel, row = compiled(case)
    found = min((cycles(body, row["num_warps"]) for body in loops(instructions(kernel.asm["cubin"]))), key=_issued)
    tile_q, tile_k = row["tile"][0], row["tile"][1] * row["span"]
    needed = PRODUCTS[case.kernel] * 2 * tile_q * tile_k * case.head_dim / FLOPS_PER_CYCLE
    blocks = tile_q * tile_k / 64**2
    shown = ("kernel", "group", "head_dim", "block", "tile", "span", "num_warps", "num_stages")
    return {
        **{name: row[name] for name in shown},
        **found,
        "needed_tensor": round(needed),
        "issue_per_tensor": round(found["issue"] / needed, 2),
        "bound_per_64x64": round(max(found.values()) / blocks),
    }


def _issued(found: dict[str, int]) -> float:
    return found["issue"] / found["tensor"]


def main() -> None:
    """Count, print and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    kept = Rows(given.output, {"triton": triton.__version__, "capability": 90, "dtype": "bfloat16", "causal": True})
    done = [[row["kernel"], row["group"], row["head_dim"], row["block"]] for row in kept.rows]
    kernels = [(kernel, 1) for kernel in TRAINING] + [("dkdv", 4)]
    for (kernel, group), head_dim, block in itertools.product(kernels, (64, 128), (64, 128)):
        if [kernel, group, head_dim, block] not in done:
            row = model(Case(kernel, 90, head_dim, block, group=group))
            kept.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
