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
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions
from sparse_prune.kernels.triton import launch
from sparse_prune.kernels.triton.configs import (
    SHARED_MEMORY,
    Call,
    decode_config,
    device_class,
    launch_config,
    probe_config,
)
from sparse_prune.kernels.triton.tables import index_tables

CPU = torch.device("cpu")
HEADS = 8
TRAINING = ("forward", "dq", "dkdv")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel as one kind of call on one device compiles it; causal, heads behind tokens in memory."""

    kernel: str
    capability: int
    head_dim: int
    block: int = 128
    dtype: torch.dtype = torch.bfloat16
    masks: int = 0
    softcap: bool = False
    dropout: bool = False
    group: int = 1
    """Query heads per key head."""
    gradient: bool = False
    """Whether the probe sees a gradient, for `Influence`."""
    apart: bool = False
    """Whether programs of dkdv have one query head of a group, not all."""
    rows: int = 4
    """Of a KV group, in decoding."""
    spills: int = 0
    """Bytes of registers that may spill."""


def _known(kernel, capability, head_dim, options):
    """Bytes that spill with every option at once, which nobody uses together."""
    return 16 if (kernel, capability, head_dim) == ("dq", 90, 128) and options == EVERYTHING else 0


EVERYTHING = {"masks": 15, "softcap": True, "dropout": True}
CROWDED = ({"masks": 2}, {"dropout": True}, EVERYTHING)
PROBED = ({}, {"masks": 1}, {"masks": 2}, {"masks": 15, "softcap": True})
GROUPS = {
    "plain": [Case(*parts) for parts in itertools.product((*TRAINING, "decode"), (80, 90), (64, 128, 256), (64, 128))],
    "groups": [
        Case("dkdv", capability, head_dim, block, group=4, apart=apart)
        for capability, head_dim, block, apart in itertools.product((80, 90), (64, 128, 256), (64, 128), (False, True))
    ]
    + [
        Case("dkdv", capability, head_dim, group=4, **options, spills=_known("dkdv", capability, head_dim, options))
        for capability, head_dim, options in itertools.product((80, 90), (64, 128, 256), CROWDED)
    ]
    + [
        Case("dkdv", 90, head_dim, block, group=4, masks=13)
        for head_dim, block in itertools.product((64, 128, 256), (64, 128))
    ],
    "10.0": [
        Case(*parts, spills=4 if parts == ("dkdv", 100, 128, 128) else 0)
        for parts in itertools.product(TRAINING, (100,), (64, 128, 256), (64, 128))
    ]
    + [Case("dkdv", 100, head_dim, block, group=4) for head_dim in (64, 128) for block in (64, 128)],
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
    ],
    "probe": [
        Case("probe", *sizes, **options, gradient=gradient, spills=416 if gradient and sizes[1:] == [256, 128] else 16)
        for *sizes, options, gradient in itertools.product((80, 90), (64, 128, 256), (64, 128), PROBED, (False, True))
    ],
    "float32": [Case(kernel, 90, 128, dtype=torch.float32) for kernel in TRAINING],
    "many rows": [
        Case("decode", 80, 128, rows=128),
        Case("decode", 80, 128, masks=15, softcap=True, rows=128, spills=1024),
        Case("decode", 80, 256, masks=15, softcap=True, rows=64, spills=1024),
    ],
}


class Device:
    """What Triton asks of a driver before it launches: kernels are compiled for this device, and none is launched."""

    def __init__(self, capability):
        memory = {"max_shared_mem": SHARED_MEMORY[device_class(capability)]}
        self.capability, self.utils = capability, SimpleNamespace(get_device_properties=lambda device: memory)

    def get_current_device(self):
        return self.capability  # what is compiled is kept by it

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def options_of(case, batch, q_len, kv_len):
    """What a case asks for. Rows of the attention mask have an odd length: it is read byte by byte."""
    asked = {
        1: {"key_mask": torch.ones(batch, kv_len, dtype=torch.bool)},
        2: {"attn_mask": torch.ones(batch, 1, q_len, kv_len, dtype=torch.bool)},
        4: {"documents": torch.zeros(batch, kv_len, dtype=torch.int32)},
        8: {"window": 100},
    }
    given = {name: value for kind, part in asked.items() if case.masks & kind for name, value in part.items()}
    rest = {"dropout_p": 0.1, "seed": 2**40} if case.dropout else {}
    return AttentionOptions(**given, **rest, softcap=30.0 if case.softcap else None)


def launched(case):
    """Launch a case by the package's own code; returns its tile, (query, key), and span."""
    sides, length = (case.block, case.block), 3 * case.block + 1
    call = Call(case.head_dim, case.dtype, sides, case.masks, case.softcap, case.dropout)
    kv_heads = HEADS // case.group

    def tensor(heads, tokens=length):
        return torch.empty(2, tokens, heads, case.head_dim, dtype=case.dtype).transpose(1, 2)

    query, key = tensor(HEADS), tensor(kv_heads)
    options = options_of(case, 2, length, length)
    if case.kernel == "probe":
        config, backward = probe_config(call), (key, query, torch.ones(HEADS, 4, 4, dtype=torch.uint8))
        launch.launch_probe(query, key, case.block, config, True, options, backward if case.gradient else None)
        return config.tile, 1
    if case.kernel == "decode":
        config = decode_config(case.rows, case.head_dim, case.dtype, sides)
        visits, keep = [torch.zeros(9, dtype=torch.int32)] * 3, torch.zeros(2 * case.rows, 1, 4, dtype=torch.uint8)
        launch.launch_decode(
            tensor(2 * case.rows, 1), tensor(2), tensor(2), length, visits, keep, 3, sides, config, 4, True,
            options_of(case, 2, 1, length),
        )  # fmt: skip
        return config.tile, 1
    config = launch_config(case.kernel, case.capability, call)
    blocks = -(-length // case.block)
    pattern = BlockPattern(torch.ones(HEADS, blocks, blocks, dtype=torch.bool), sides, True, length, length)
    members = (1 if case.apart else case.group) if case.kernel == "dkdv" else None
    tables, sums = index_tables(pattern, config.tile, CPU, members).tensors(), torch.empty(query.shape[:3])
    if case.kernel == "forward":
        launch.launch_forward(query, key, key, tables, config, True, options)
    elif case.kernel == "dq":
        launch.launch_dq(query, key, key, query, query, sums, tables, config, True, options)
    else:
        launch.launch_dkdv(query, key, key, query, sums, sums, tables, config, True, options)
    return config.tile, config.span


def resources(ptx, capability):
    """Registers and spilled bytes, as ptxas reports them."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
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
    kernels, run = {}, JITFunction.run

    def compile_only(function, *args, warmup, **kwargs):
        kernels[function.__name__] = run(function, *args, warmup=True, **kwargs)

    driver.set_active(Device(case.capability))
    with mock.patch.object(JITFunction, "run", compile_only):
        tile, span = launched(case)
    kernel = kernels[f"{case.kernel}_kernel"]
    made = {name: getattr(kernel.metadata, name) for name in ("num_warps", "num_stages", "tmem_size")}
    return kernel, vars(case) | {"dtype": NAMES[case.dtype], "tile": tile, "span": span, **made}


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
