"""Description of this machine, for reports of measurements."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine() -> dict[str, str]:
    """Describe processor, threads, GPU and package versions."""
    names = ("torch", "triton", "pytorch-lightning", "transformers", "sparse_prune")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads{gpu}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in names),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
