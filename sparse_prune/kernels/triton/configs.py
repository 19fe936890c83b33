"""Launch configurations: tile sizes, warps and pipeline stages by device, head size and dtype.

The entries are those that compile without register spills (tests/kernels/test_triton_aot.py); they have not been
measured on a GPU. `tuning.tune` measures the candidates on the device at hand.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kernel = Literal["forward", "dq", "dkdv"]
KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
MIN_TILE = 16
"""Smallest side of a tensor-core product."""


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched."""

    tile: tuple[int, int]
    """Tokens per tile, (query, key)."""
    num_warps: int
    num_stages: int


_HALF: dict[tuple[Kernel, int, int], LaunchConfig] = {
    # (kernel, compute capability, padded head_dim)
    ("forward", 80, 64): LaunchConfig((128, 64), 4, 3),
    ("forward", 80, 128): LaunchConfig((128, 64), 8, 3),
    ("forward", 80, 256): LaunchConfig((64, 32), 8, 2),
    ("forward", 90, 64): LaunchConfig((128, 64), 4, 3),
    ("forward", 90, 128): LaunchConfig((128, 64), 8, 3),
    ("forward", 90, 256): LaunchConfig((64, 64), 8, 2),
    ("dq", 80, 64): LaunchConfig((128, 64), 8, 2),
    ("dq", 80, 128): LaunchConfig((128, 32), 8, 2),
    ("dq", 80, 256): LaunchConfig((32, 32), 8, 2),
    ("dq", 90, 64): LaunchConfig((128, 64), 8, 3),
    ("dq", 90, 128): LaunchConfig((128, 64), 8, 2),
    ("dq", 90, 256): LaunchConfig((64, 32), 8, 2),
    ("dkdv", 80, 64): LaunchConfig((64, 128), 8, 2),
    ("dkdv", 80, 128): LaunchConfig((32, 64), 4, 2),
    ("dkdv", 80, 256): LaunchConfig((32, 32), 8, 1),
    ("dkdv", 90, 64): LaunchConfig((64, 128), 8, 3),
    ("dkdv", 90, 128): LaunchConfig((64, 64), 8, 2),
    ("dkdv", 90, 256): LaunchConfig((16, 64), 8, 2),
}


MAX_PACK = 128
"""Largest number of query rows of a KV group that one decoding program takes."""


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that holds a head."""
    return max(MIN_TILE, 1 << (head_dim - 1).bit_length())


def launch_config(
    kernel: Kernel, capability: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]
) -> LaunchConfig:
    """The configuration for one launch.

    Args:
        kernel: Which kernel.
        capability: Compute capability, 80 for 8.0; newer ones take the entries of 90, older ones those of 80.
        head_dim: At most 256.
        dtype: float16, bfloat16 or float32; float32 needs twice the memory and takes smaller tiles.
        block_size: The pattern's block; tiles divide it.

    Raises:
        ValueError: If the head is too large or the block has no power of two of at least 16 as a factor.
    """
    _check_head_dim(head_dim)
    width = max(64, padded_head_dim(head_dim))
    config = _HALF[kernel, 90 if capability >= 90 else 80, width]
    fitted = _fitted(config, dtype, block_size)
    # A tile needs enough rows for its warps; dk and dv hold two accumulators, which need more of them.
    small = max(fitted.tile) <= (32 if kernel == "dkdv" else 64) and width < 256
    return replace(fitted, num_warps=4) if small else fitted


def candidates(
    kernel: Kernel, capability: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]
) -> list[LaunchConfig]:
    """Configurations worth measuring on a device, the shipped one first; arguments and errors as `launch_config`."""
    shipped = launch_config(kernel, capability, head_dim, dtype, block_size)
    tile_q, tile_k = shipped.tile
    tiles = [(tile_q, tile_k), (tile_q // 2, tile_k), (tile_q, tile_k // 2), (tile_q * 2, tile_k), (tile_q, tile_k * 2)]
    found = [shipped]
    for tile, warps, stages in itertools.product(tiles, (4, 8), (2, 3)):
        if min(tile) >= MIN_TILE and max(tile) <= 128:
            config = _fitted(LaunchConfig(tile, warps, stages), dtype, block_size)
            if config not in found:
                found.append(config)
    return found


def decode_config(rows: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]) -> LaunchConfig:
    """The configuration of one decoding launch; its query side holds the `rows` of a KV group.

    Raises:
        ValueError: If there are too many rows, the head is too large, or the block has no factor of 16.
    """
    if rows > MAX_PACK:
        raise ValueError(
            f"Decoding takes at most {MAX_PACK} rows (queries times heads of a KV group), got {rows}. "
            "Pass fewer queries at a time."
        )
    _check_head_dim(head_dim)
    tile_k = _fit(32 if dtype == torch.float32 else 64, block_size[1])
    return LaunchConfig((max(MIN_TILE, 1 << (rows - 1).bit_length()), tile_k), 4, 2)


def probe_config(block_size: tuple[int, int]) -> LaunchConfig:
    """The configuration of the probe, whose tile is the pattern's block.

    Raises:
        ValueError: If a side of the block is not a power of two from 16 to 128.
    """
    if any(not MIN_TILE <= side <= 128 or side & (side - 1) for side in block_size):
        raise ValueError(
            f"`block_size` must be powers of two from {MIN_TILE} to 128 for the Triton probe, got {block_size}. "
            "Use 64 or 128."
        )
    large = math.prod(block_size) >= 128 * 128
    return LaunchConfig(block_size, 8, 1) if large else LaunchConfig(block_size, 4, 2)


def _fitted(config: LaunchConfig, dtype: torch.dtype, block_size: tuple[int, int]) -> LaunchConfig:
    """The configuration with tiles that divide the block and, in float32, fit into shared memory."""
    sides = [_fit(side, block) for side, block in zip(config.tile, block_size, strict=True)]
    if dtype == torch.float32:
        sides = [min(side, 32) for side in sides]
        config = replace(config, num_stages=1)
    return LaunchConfig((sides[0], sides[1]), config.num_warps, config.num_stages)


def _check_head_dim(head_dim: int) -> None:
    if not 1 <= head_dim <= 256:
        raise ValueError(f"`head_dim` must lie in 1..256 for the Triton backend, got {head_dim}. Use backend='gather'.")


def _fit(side: int, block: int) -> int:
    largest = min(side, block & -block)
    if largest < MIN_TILE:
        raise ValueError(
            f"`block_size` must hold the factor {MIN_TILE} for the Triton backend, got {block}. "
            "Use 64 or 128, or backend='gather'."
        )
    return largest
