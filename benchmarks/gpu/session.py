"""What the stages of the campaign share: the device, the dtypes that it computes with, and what a file says of it."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dtypes() -> tuple[torch.dtype, ...]:
    """Those that are checked; Triton's interpreter computes bfloat16 in NumPy, which has none."""
    return (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)


def about() -> dict[str, Any]:
    """Device and versions, to stand beside rows; a figure without a GPU means nothing."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreted: a rehearsal"
    packages = ("torch", "triton", "transformers", "numpy", "pytorch-lightning")
    return {"device": device, "python": platform.python_version(), **{name: version(name) for name in packages}}
