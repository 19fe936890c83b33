"""Launch configurations: tile sizes, warps and pipeline stages by device, head size and dtype.

The entries are those that compile with few register spills or none (docs/kernels.md has the figures); they have not
been measured on a GPU. `tuning.tune` measures the candidates on the device at hand.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from sparse_prune.kernels.options import AttentionOptions

Kernel = Literal["forward", "dq", "dkdv"]
KERNELS: tuple[Kernel, ...] = ("forward", "dq", "dkdv")
MIN_TILE = 16
"""Smallest side of a tensor-core product."""


class Traits(NamedTuple):
    """The traits of an attention call's options that a kernel is compiled for; the last fields of a `Call`."""

    masks: int = 0
    """Kinds of masks, as `mask_kinds` counts them."""
    softcap: bool = False
    """Whether logits are capped."""
    dropout: bool = False
    """Whether weights are dropped."""


class Call(NamedTuple):
    """The traits of an attention call that decide on its launch configuration."""

    head_dim: int
    """1 to 256."""
    dtype: torch.dtype
    """float16, bfloat16 or float32."""
    block_size: tuple[int, int]
    """Tokens per block side of the pattern, (query, key); tiles divide it."""
    masks: int = 0
    """Kinds of masks, as `mask_kinds` counts them."""
    softcap: bool = False
    """Whether logits are capped."""
    dropout: bool = False
    """Whether weights are dropped."""


def mask_kinds(options: AttentionOptions) -> int:
    """Add up the kinds of masks that are given: 1 key mask, 2 attention mask, 4 documents, 8 window."""
    masks = (options.key_mask is not None) + 2 * (options.attn_mask is not None)
    return masks + 4 * (options.documents is not None) + 8 * (options.window is not None)


def traits(options: AttentionOptions) -> Traits:
    """Return what of the options a kernel is compiled for."""
    return Traits(mask_kinds(options), options.softcap is not None, options.dropout_p > 0)


@dataclass(frozen=True)
class LaunchConfig:
    """The launch configuration of one kernel."""

    tile: tuple[int, int]
    """Tokens per tile, (query, key)."""
    num_warps: int
    num_stages: int
    span: int = 1
    """Key tiles that the forward kernel multiplies at a time where no element is masked, 1 or 2."""

    def numbers(self) -> list[int]:
        """Return the fields in order, as operators and files take them; `of` makes a configuration of them again."""
        return [*self.tile, self.num_warps, self.num_stages, self.span]

    @classmethod
    def of(cls, numbers: list[int]) -> LaunchConfig:
        """Make a configuration of its five numbers."""
        tile_q, tile_k, num_warps, num_stages, span = numbers
        return cls((tile_q, tile_k), num_warps, num_stages, span)


def capability(device: torch.device) -> int:
    """Return the compute capability, 90 for 9.0; the interpreter passes for 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Return the number of the device's processors (streaming multiprocessors); 4 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Device class -> bytes that one program may have (CUDA programming guide, compute capabilities)."""


def device_class(capability: int) -> int:
    """Return whose entries a device takes: 90 (9.x to 11.x: H100, B200), 80 (A100), 89 (8.6, 8.9, 12.x, older ones).

    Shared memory decides: the last, cards for workstations and at home, have less than half of an H100's.
    """
    if 90 <= capability < 120:
        return 90
    return 80 if capability in (80, 87) else 89


_PLAIN: dict[tuple[Kernel, int, int], LaunchConfig] = {
    # (kernel, device class, padded head_dim), float16 and bfloat16. With two stages ptxas serializes the products of a
    # warp group on 9.0 (its warning C7515): three there.
    ("forward", 80, 64): LaunchConfig((128, 64), 8, 3),
    ("forward", 80, 128): LaunchConfig((128, 64), 8, 3),
    ("forward", 80, 256): LaunchConfig((64, 32), 8, 2),
    ("forward", 90, 64): LaunchConfig((128, 64), 4, 3),
    ("forward", 90, 128): LaunchConfig((128, 128), 8, 3),
    ("forward", 90, 256): LaunchConfig((128, 32), 8, 3),
    ("dq", 80, 64): LaunchConfig((128, 64), 8, 2),
    ("dq", 80, 128): LaunchConfig((128, 32), 8, 2),
    ("dq", 80, 256): LaunchConfig((32, 32), 8, 2),
    ("dq", 90, 64): LaunchConfig((128, 64), 8, 3),
    ("dq", 90, 128): LaunchConfig((128, 64), 8, 3),
    ("dq", 90, 256): LaunchConfig((128, 32), 8, 3),
    ("dkdv", 80, 64): LaunchConfig((64, 128), 8, 2),
    ("dkdv", 80, 128): LaunchConfig((32, 64), 4, 2),
    ("dkdv", 80, 256): LaunchConfig((32, 32), 8, 1),
    ("dkdv", 90, 64): LaunchConfig((64, 128), 8, 3),
    ("dkdv", 90, 128): LaunchConfig((32, 128), 8, 3),
    ("dkdv", 90, 256): LaunchConfig((32, 32), 8, 3),  # too few rows for the products of a warp group, which spill
}
_MASKED: dict[tuple[Kernel, int, tuple[int, int]], LaunchConfig] = {
    # With key masks, documents or windows, where the tile of a call without them spills, or serializes on 90.
    ("forward", 64, (128, 64)): LaunchConfig((128, 64), 8, 3),
    ("forward", 128, (128, 128)): LaunchConfig((128, 64), 8, 3),
    ("forward", 128, (64, 64)): LaunchConfig((64, 32), 4, 3),
    ("dkdv", 64, (64, 128)): LaunchConfig((32, 128), 8, 3),
    ("dkdv", 64, (64, 64)): LaunchConfig((32, 64), 4, 3),
    ("dkdv", 128, (32, 128)): LaunchConfig((16, 128), 8, 3),
    ("dkdv", 128, (32, 64)): LaunchConfig((16, 64), 4, 3),
}
_SMALL: dict[tuple[Kernel, int], LaunchConfig] = {
    # What of the entries of 80 does not fit 99 KiB with every mask.
    ("forward", 128): LaunchConfig((128, 64), 8, 2),
}
_CROWDED: dict[tuple[Kernel, int], LaunchConfig] = {
    # Attention masks are read from memory, dropout draws numbers, a soft cap has a slope: they need registers.
    ("forward", 64): LaunchConfig((64, 32), 8, 3),
    ("forward", 128): LaunchConfig((64, 32), 8, 3),
    ("forward", 256): LaunchConfig((32, 16), 8, 3),
    ("dq", 64): LaunchConfig((64, 32), 8, 3),
    ("dq", 128): LaunchConfig((64, 32), 8, 3),
    ("dq", 256): LaunchConfig((32, 32), 8, 3),
    ("dkdv", 64): LaunchConfig((16, 64), 8, 3),
    ("dkdv", 128): LaunchConfig((16, 64), 8, 3),
    ("dkdv", 256): LaunchConfig((16, 32), 8, 3),
}
_FLOAT32: dict[tuple[Kernel, int], LaunchConfig] = {
    # No tensor cores: operands stand in registers.
    ("forward", 64): LaunchConfig((32, 32), 4, 1),
    ("forward", 128): LaunchConfig((32, 32), 8, 1),
    ("forward", 256): LaunchConfig((16, 16), 8, 1),
    ("dq", 64): LaunchConfig((32, 32), 4, 1),
    ("dq", 128): LaunchConfig((16, 16), 8, 1),
    ("dq", 256): LaunchConfig((16, 16), 8, 1),
    ("dkdv", 64): LaunchConfig((32, 32), 4, 1),
    ("dkdv", 128): LaunchConfig((32, 16), 8, 1),
    ("dkdv", 256): LaunchConfig((16, 16), 8, 1),
}


def padded_head_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, that holds a head."""
    return max(MIN_TILE, 1 << (head_dim - 1).bit_length())


def launch_config(kernel: Kernel, capability: int, call: Call) -> LaunchConfig:
    """Choose the configuration of a call's kernel; float32, attention masks and dropout take smaller tiles.

    Raises:
        ValueError: If the head is too large or the block has no power of two of at least 16 as a factor.
    """
    _check_head_dim(call.head_dim)
    width, device = max(64, padded_head_dim(call.head_dim)), device_class(capability)
    if call.dtype == torch.float32:
        return _fitted(_FLOAT32[kernel, width], call.block_size)
    if call.masks & 2 or call.dropout or (call.softcap and kernel == "dkdv"):
        crowded = _fitted(_CROWDED[kernel, width], call.block_size)
        return crowded if device == 90 else replace(crowded, num_stages=2)
    plain = _PLAIN[kernel, 90 if device == 90 else 80, width]
    fitted = _fitted(_SMALL.get((kernel, width), plain) if device == 89 else plain, call.block_size)
    if _small(kernel, fitted.tile, width, device):
        fitted = replace(fitted, num_warps=4)
    if capability >= 100 and device == 90 and (kernel, width, fitted.tile) == ("dq", 256, (128, 32)):
        fitted = replace(fitted, num_stages=2)  # the fifth generation's products read more from shared memory
    if (kernel, device, width, fitted.tile) == ("forward", 90, 64, (64, 64)) and not call.masks and not call.softcap:
        fitted = replace(fitted, span=2)  # exponentials bound so short a head: a wider tile has less beside them
    return _MASKED.get((kernel, width, fitted.tile), fitted) if call.masks else fitted


def _small(kernel: Kernel, tile: tuple[int, int], width: int, device: int) -> bool:
    """Whether a tile has too few rows for eight warps (Hopper's products take 64 for each four), and four hold it."""
    if width == 256:
        return max(tile) <= 32 and kernel != "dkdv"
    return max(tile) <= 64 and (device == 90 or width == 64)


def candidates(kernel: Kernel, capability: int, call: Call) -> list[LaunchConfig]:
    """List configurations worth measuring, the shipped one first; arguments and errors as `launch_config`."""
    shipped = launch_config(kernel, capability, call)
    tile_q, tile_k = shipped.tile
    tiles = [(tile_q, tile_k), (tile_q // 2, tile_k), (tile_q, tile_k // 2), (tile_q * 2, tile_k), (tile_q, tile_k * 2)]
    single = call.dtype == torch.float32  # larger tiles than the shipped ones take minutes to compile and spill
    largest, stages_tried = (max(shipped.tile), (1, 2)) if single else (128, (2, 3))
    found = [shipped]
    for tile, warps, stages in itertools.product(tiles, (4, 8), stages_tried):
        if min(tile) >= MIN_TILE and max(tile) <= largest:
            config = _fitted(LaunchConfig(tile, warps, stages), call.block_size)
            if config not in found:
                found.append(config)
    return found


def most_rows(head_dim: int, dtype: torch.dtype) -> int:
    """Return the most query rows of a KV group that one decoding program takes: its registers hold that many.

    float32 is multiplied without tensor cores, which takes registers for the operands as well.
    """
    rows = 64 if padded_head_dim(head_dim) > 128 else 128
    return rows // 4 if dtype == torch.float32 else rows


def decode_config(rows: int, head_dim: int, dtype: torch.dtype, block_size: tuple[int, int]) -> LaunchConfig:
    """Choose the configuration of one decoding launch; its query side holds the `rows` of a KV group.

    Raises:
        ValueError: If there are too many rows, the head is too large, or the block has no factor of 16.
    """
    _check_head_dim(head_dim)
    most = most_rows(head_dim, dtype)
    if rows > most:
        raise ValueError(
            f"`query` must hold at most {most} rows (queries times heads of a KV group) of head_dim {head_dim} and "
            f"{dtype} in decoding, got {rows}. Pass fewer queries at a time."
        )
    stack = max(MIN_TILE, 1 << (rows - 1).bit_length())
    tile_k = _fit(32 if dtype == torch.float32 or stack * padded_head_dim(head_dim) > 64 * 64 else 64, block_size[1])
    return LaunchConfig((stack, tile_k), 8 if stack >= 64 else 4, 2)


def probe_config(call: Call) -> LaunchConfig:
    """Choose the configuration of the probe, whose tile is some rows of a block, and all keys of it.

    Raises:
        ValueError: If the head is too large, or a side of the block is not a power of two from 16 to 128 (to 32 in
            float32, whose larger tiles take minutes to compile and spill tens of kilobytes).
    """
    _check_head_dim(call.head_dim)
    largest = 32 if call.dtype == torch.float32 else 128
    if any(not MIN_TILE <= side <= largest or side & (side - 1) for side in call.block_size):
        raise ValueError(
            f"`block_size` must be powers of two from {MIN_TILE} to {largest} for the Triton probe in {call.dtype}, "
            f"got {call.block_size}. Use scores.probe_blocks, or another block size."
        )
    rows = (16 if call.softcap else 32) if call.masks & 2 else 64  # an attention mask and a soft cap need registers
    tile = (min(rows, call.block_size[0]), call.block_size[1])
    long = padded_head_dim(call.head_dim) * tile[1] > 128 * 128  # two stages of keys and values would not fit
    return LaunchConfig(tile, 8 if call.masks & 2 or tile[1] == 128 else 4, 1 if long else 2)


def _fitted(config: LaunchConfig, block_size: tuple[int, int]) -> LaunchConfig:
    """The configuration with tiles that divide the block."""
    tile = _fit(config.tile[0], block_size[0]), _fit(config.tile[1], block_size[1])
    return replace(config, tile=tile)


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
