"""Compiles every shipped configuration ahead of time, without a GPU, and prints what came out as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python tests/kernels/aot.py`.
"""

import inspect
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from sparse_prune.kernels.triton.backward import dkdv_kernel, dq_kernel
from sparse_prune.kernels.triton.configs import decode_config, launch_config, probe_config
from sparse_prune.kernels.triton.decode import decode_kernel
from sparse_prune.kernels.triton.forward import forward_kernel
from sparse_prune.kernels.triton.probe import probe_kernel

KERNELS = {
    "forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel, "decode": decode_kernel, "probe": probe_kernel,
}  # fmt: skip
FLOATS = {"lse", "delta", "known_lse", "sums", "part", "part_lse", "grad_k", "grad_v"}
INDEX = {"start", "full", "index", "order", "documents"}
BYTES = {"key_mask", "attn_mask", "keep"}


def choose(name, capability, head_dim, block):
    """The configuration that is launched, and what its kernel is compiled for."""
    values = {"HEAD": head_dim, "CAUSAL": True, "MASKS": 0, "SOFTCAP": False, "PADDED": False}
    if name == "probe":
        return probe_config((block, block)), values | {"BLOCK_Q": block, "BLOCK_K": block, "HAS_LSE": False}
    if name == "decode":
        config = decode_config(4, head_dim, torch.bfloat16, (block, block))
        tiles = {"BLOCK_Q": block, "TILES": block // config.tile[1], "TILE_K": config.tile[1], "PACK": config.tile[0]}
        return config, values | tiles
    config = launch_config(name, capability, head_dim, torch.bfloat16, (block, block))
    return config, values | {"TILE_Q": config.tile[0], "TILE_K": config.tile[1], "DROPOUT": False}


def source(kernel, values):
    """The kernel as a bf16 call with contiguous heads specialises it."""
    values, signature, attributes = dict(values), {}, {}
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in values or re.fullmatch(r"stride_.d", name):
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
            signature[name] = "*bf16"
        elif name in ("scale", "softcap", "dropout_p"):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name == "seed" else "i32"
        if signature[name].startswith("*") or name.startswith("stride_") or name == "head_dim":
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
    return {"registers": max(int(n) for n in re.findall(r"Used (\d+) registers", log)), "spills": max(spills)}


def main():
    rows = []
    for name, capability, head_dim, block in itertools.product(KERNELS, (80, 90), (64, 128, 256), (64, 128)):
        config, values = choose(name, capability, head_dim, block)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        compiled = triton.compile(
            source(KERNELS[name], values), target=GPUTarget("cuda", capability, 32), options=options
        )
        ptx = compiled.asm["ptx"]
        rows.append(
            {
                "kernel": name, "capability": capability, "head_dim": head_dim, "block": block,
                "tile": config.tile, **options, "shared": compiled.metadata.shared,
                "wgmma": "wgmma.mma_async" in ptx, "mma": "mma.sync" in ptx, **resources(ptx, capability),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
