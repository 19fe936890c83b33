"""Triton's interpreter, which runs kernels on a CPU."""

from __future__ import annotations

import os


def triton_interprets() -> bool:
    """Whether Triton runs its kernels on a CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
