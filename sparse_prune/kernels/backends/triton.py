"""The Triton backend: skips pruned blocks on a GPU, can be traced by torch.compile, decodes, and can be tuned."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sparse_prune.kernels.backend import Backend, HeldBlocks, named_pattern
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import Traits, traits
from sparse_prune.kernels.triton.interpreter import triton_interprets
from sparse_prune.pattern import BlockPattern


def triton_kernels() -> ModuleType | None:
    """Import the Triton kernels; None without the triton package."""
    try:
        from sparse_prune.kernels.triton import attend
    except ImportError:
        return None
    return attend


def _attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    kernels = triton_kernels()
    if kernels is None:
        raise ValueError("`backend='triton'` needs the triton package. Install it, or use 'gather'.")
    output: Tensor = kernels.attend(query, key, value, pattern, options)
    return output


def _suits_moving(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> bool:
    kernels = triton_kernels() if query.device.type == "cuda" else None
    return kernels is not None and bool(kernels.supports(query, pattern.block_size))


def _traced(query: Tensor, key: Tensor, value: Tensor, name: str, causal: bool, options: AttentionOptions) -> Tensor:
    from sparse_prune.kernels.triton.attend import attend_planned, call_dtype, width

    lengths, dtype = (query.shape[2], key.shape[2]), call_dtype(query)
    call = (width(query, value), dtype, query.device, traits(options), key.shape[1], query.shape[0])
    planned = _plan(name, *lengths, *call)
    return attend_planned(query, key, value, planned, causal, options)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _plan(
    name: str, q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, device: torch.device, traits: Traits,
    kv_heads: int, batch: int,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    from sparse_prune.kernels.triton.attend import plan

    pattern = named_pattern(name).at(q_len, kv_len)
    planned: tuple[list[Tensor], list[int]] = plan(
        pattern, head_dim, dtype, device, traits, kv_heads, batch
    )  # fmt: skip
    return planned


def _decode(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions,
    held: HeldBlocks | None = None, kv_len: int | None = None,
) -> Tensor | None:  # fmt: skip
    from sparse_prune.kernels.triton.attend import decode, decodes

    if not decodes(query, key if held is None else held.shown(key), value):
        return None  # more rows are masked
    return decode(query, key, value, pattern, options, held, kv_len)


def _tune(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions, seconds: float
) -> None:
    from sparse_prune.kernels.triton.attend import check_supported, same_width
    from sparse_prune.kernels.triton.tuning import tune

    check_supported(query)
    tune(*same_width(query, key, value), pattern, options, seconds=seconds)


BACKEND = Backend(
    "triton",
    _attend,
    skips_on=("cuda",),
    rank=10,
    trains=lambda device: device.type == "cuda" or triton_interprets(),
    usable=lambda: torch.cuda.is_available(),
    suits_moving=_suits_moving,
    traced=_traced,
    decode=_decode,
    tune=_tune,
)
