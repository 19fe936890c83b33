"""Compiles launch configurations ahead of time, without a GPU, and prints what came out as JSON.

python benchmarks/gpu/ahead_of_time.py GROUP  # TRITON_INTERPRET must not be set
"""

import argparse
import inspect
import itertools
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from sparse_prune.kernels.triton.backward import dkdv_kernel, dq_kernel
from sparse_prune.kernels.triton.configs import Call, decode_config, launch_config, probe_config
from sparse_prune.kernels.triton.decode import decode_kernel
from sparse_prune.kernels.triton.forward import forward_kernel
from sparse_prune.kernels.triton.influence import influence_kernel, influence_tile
from sparse_prune.kernels.triton.probe import probe_kernel

KERNELS = {
    "forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "decode": decode_kernel, "probe": probe_kernel,
    "influence": influence_kernel,
}  # fmt: skip
TRAINING = ("forward", "dq", "dkdv")
FLOATS = {"rises", "lse", "delta", "sums", "part", "part_lse", "grad_k", "grad_v"}
INDEX = {"shown", "start", "full", "index", "place", "order", "documents"}
BYTES = {"key_mask", "attn_mask", "keep"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as one kind of call on one device compiles it; causal, contiguous heads."""

    kernel: str
    capability: int
    head_dim: int
    block: int = 128
    dtype: torch.dtype = torch.bfloat16
    masks: int = 0
    softcap: bool = False
    dropout: bool = False
    rows: int = 4
    """Of a KV group, in decoding."""
    spills: int = 0
    """Bytes of registers that may spill."""


def _known(kernel, capability, head_dim, options):
    """Bytes that spill with every option at once, which nobody uses together."""
    return 16 if (kernel, capability, head_dim) == ("dq", 90, 128) and options == EVERYTHING else 0


EVERYTHING = {"masks": 15, "softcap": True, "dropout": True}
CROWDED = ({"masks": 2}, {"dropout": True}, EVERYTHING)
GROUPS = {
    "plain": [
        Case(*parts) for parts in itertools.product((*TRAINING, "decode", "probe"), (80, 90), (64, 128, 256), (64, 128))
    ],
    "small devices": [Case(*parts) for parts in itertools.product(TRAINING, (89,), (64, 128, 256))],
    # Key mask, documents, window, and all three.
    "masks": [
        Case(kernel, 90, head_dim, block, masks=masks)
        for kernel, head_dim, block, masks in itertools.product(TRAINING, (64, 128, 256), (64, 128), (1, 4, 8, 13))
    ]
    + [Case(kernel, 80, 128, masks=13, spills=4 if kernel == "forward" else 0) for kernel in TRAINING]
    + [Case(kernel, 90, head_dim, softcap=True) for kernel in TRAINING for head_dim in (64, 128)],
    "every option": [
        Case(kernel, capability, head_dim, **options, spills=_known(kernel, capability, head_dim, options))
        for kernel, capability, head_dim, options in itertools.product(TRAINING, (80, 90), (64, 128, 256), CROWDED)
    ]
    + [Case("probe", 90, 128, masks=15, softcap=True, spills=256)],
    "influence": [
        Case(
            "influence", capability, head_dim, block, spills=8 if (capability, head_dim, block) == (80, 128, 128) else 0
        )
        for capability, head_dim, block in itertools.product((80, 90), (64, 128), (64, 128))
    ],
    "float32": [Case(kernel, 90, 128, dtype=torch.float32) for kernel in TRAINING],
    "many rows": [
        Case("decode", 80, 128, rows=128),
        Case("decode", 80, 128, masks=15, softcap=True, rows=128, spills=1024),
        Case("decode", 80, 256, masks=15, softcap=True, rows=64, spills=1024),
    ],
}


def choose(case):
    """The configuration that is launched, and what its kernel is compiled for."""
    head_dim, sides = case.head_dim, (case.block, case.block)
    call = Call(head_dim, case.dtype, sides, case.masks, case.softcap, case.dropout)
    values = {
        "HEAD": head_dim, "CAUSAL": True, "MASKS": case.masks, "SOFTCAP": case.softcap, "PADDED": False,
    }  # fmt: skip
    if case.kernel == "probe":
        values |= {"BLOCK_Q": case.block, "BLOCK_K": case.block}
        return probe_config(call), values
    if case.kernel == "influence":
        tile = influence_tile((case.block, case.block))
        return probe_config(call), values | {"TILE_Q": tile, "TILES": case.block // tile, "BLOCK_K": case.block}
    if case.kernel == "decode":
        config = decode_config(case.rows, head_dim, case.dtype, sides)
        stack, tile = config.tile
        return config, values | {"BLOCK_Q": case.block, "TILES": case.block // tile, "TILE_K": tile, "STACK": stack}
    config = launch_config(case.kernel, case.capability, call)
    values |= {"TILE_Q": config.tile[0], "TILE_K": config.tile[1], "DROPOUT": case.dropout}
    return config, values | ({"SPAN": config.span} if case.kernel == "forward" else {})


def source(case, values):
    """The kernel as a call specialises it: of an attention mask the rows are contiguous, of a length that 16 does not
    divide, so that it is read byte by byte."""
    kernel = KERNELS[case.kernel]
    values, signature, attributes = dict(values), {}, {}
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in values or re.fullmatch(r"stride_.d", name) or (name == "stride_mask_k" and case.masks & 2):
            values.setdefault(name, 1)
            signature[name] = "constexpr"
            continue
        if name in INDEX:
            signature[name] = "*i32"
        elif name in BYTES:
            signature[name] = "*u8"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in ("q", "k", "v", "out", "grad_out", "grad_q"):
            signature[name] = f"*{NAMES[case.dtype]}"
        elif name in ("scale", "softcap", "dropout_p", "least_rest", "largest"):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name == "seed" else "i32"
        even = name.startswith("stride_") and not name.startswith("stride_mask") or name == "head_dim"
        if signature[name].startswith("*") or even:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, values, attributes)


def resources(ptx, capability):
    """Registers and spilled bytes, as ptxas reports them."""
    arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    found = nvidia.get_ptxas(capability) if inspect.signature(nvidia.get_ptxas).parameters else nvidia.get_ptxas()
    ptxas = getattr(found, "path", found[0] if isinstance(found, tuple) else found)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}", str(path), "-o", str(Path(folder) / "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", log))
    # C7515: products of a warp group wait for each other, as registers are written while they run.
    return {"registers": registers, "spilled": max(spills), "serialized": "erializ" in log and "wgmma" in log}


def compiled(case):
    """What Triton made of a case, and a row that says what of: the case and its configuration."""
    config, values = choose(case)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = triton.compile(source(case, values), target=GPUTarget("cuda", case.capability, 32), options=options)
    return kernel, vars(case) | {"dtype": NAMES[case.dtype], "tile": config.tile, "span": config.span, **options}


def main(group):
    for case in GROUPS[group]:
        kernel, row = compiled(case)
        ptx = kernel.asm["ptx"]
        row |= {"shared": kernel.metadata.shared, "wgmma": "wgmma.mma_async" in ptx, "mma": "mma.sync" in ptx}
        print(json.dumps(row | resources(ptx, case.capability)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    main(parser.parse_args().group)
