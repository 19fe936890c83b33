"""From checked tensors to launches, and the autograd operator around them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.backward import dkdv_kernel, dq_kernel
from sparse_prune.kernels.triton.configs import KERNELS, Kernel, LaunchConfig, launch_config, padded_head_dim
from sparse_prune.kernels.triton.forward import forward_kernel
from sparse_prune.kernels.triton.probe import probe_kernel
from sparse_prune.kernels.triton.tables import Visits, index_tables
from sparse_prune.pattern import BlockPattern, num_blocks
from sparse_prune.scores import BlockStatistics

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Shapes as in `reference.attend`. Deterministic; the backward pass recomputes the weights.

    Raises:
        ValueError: If device, dtype, head size or block size are not supported; the message names the remedy.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_supported(query)
    # Asked for now, so that an unsuitable block is refused before anything runs.
    for kernel in KERNELS:
        _config(kernel, query, pattern.block_size)
    function: Any = _TritonAttention  # torch leaves `apply` untyped
    with torch.autocast(kind, enabled=False):
        output: Tensor = function.apply(query, key, value, pattern, options)
    return output


def check_supported(query: Tensor) -> None:
    """Refuse what the kernels cannot run.

    Raises:
        ValueError: If the tensor is not on a GPU (or Triton does not interpret) or has another dtype.
    """
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"The Triton backend needs CUDA tensors, got {query.device}. "
            "Use backend='gather', or set TRITON_INTERPRET=1 before the import to check kernels on the CPU."
        )
    if query.dtype not in _DTYPES:
        raise ValueError(f"The Triton backend needs one of {_DTYPES}, got {query.dtype}. Use backend='gather'.")


def probe(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    causal: bool,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
) -> BlockStatistics:
    """As `scores.probe_blocks`, by the probe kernel. Logits that are not finite show in the sums and are refused.

    Raises:
        ValueError: If the input is unsupported or not finite, or if a side of the block is not a power of two of at
            least 16.
    """
    check_supported(query)
    if any(side < 16 or side & (side - 1) for side in block_size):
        raise ValueError(f"`block_size` must be powers of two of at least 16 for the Triton probe, got {block_size}.")
    batch, heads, q_len, head_dim = query.shape
    kv_len = key.shape[2]
    rows, cols = num_blocks(q_len, block_size[0]), num_blocks(kv_len, block_size[1])
    if key_mask is not None and q_len == kv_len:
        # Padded queries do not count: as rows without a key they add nothing.
        rows_real = key_mask[:, None, :, None]
        attn_mask = rows_real if attn_mask is None else attn_mask & rows_real
    options = AttentionOptions(scale=scale, key_mask=key_mask, attn_mask=attn_mask, softcap=softcap)
    sums = torch.zeros(3, batch, heads, rows, cols, dtype=torch.float32, device=query.device)
    masks, mask_strides = _masks(options, (batch, heads, q_len, kv_len), query)
    probe_kernel[(rows, heads, batch)](
        query, key, sums, *masks, *query.stride(), *key.stride(), *mask_strides,
        heads, heads // key.shape[1], rows, cols, q_len, kv_len, head_dim, _scale(options, head_dim), softcap or 1.0,
        BLOCK_Q=block_size[0], BLOCK_K=block_size[1], HEAD=padded_head_dim(head_dim), CAUSAL=causal,
        HAS_KEY_MASK=key_mask is not None, HAS_ATTN_MASK=attn_mask is not None, SOFTCAP=softcap is not None,
        PADDED=padded_head_dim(head_dim) != head_dim, num_warps=4, num_stages=2,
    )  # fmt: skip
    if not torch.isfinite(sums).all():
        raise ValueError("Attention logits must be finite, got NaN or infinity. Lower the learning rate.")
    # A row with a key has mass 1, any other row none: the rows are counted by their mass.
    per_row = sums[0].sum(-1).amax(1).double().round()  # (batch, rows)
    counts = torch.stack([per_row.sum(0), (per_row > 0).sum(0).double()])
    return BlockStatistics(sums.double().sum(1).cpu(), counts.cpu())


class _TritonAttention(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp of each row."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions
    ) -> Tensor:
        batch, heads, q_len, _ = query.shape
        config = _config("forward", query, pattern.block_size)
        output = torch.empty_like(query)
        lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=query.device)
        visits = index_tables(pattern, config.tile, query.device).rows
        strides = (*query.stride(), *key.stride(), *value.stride(), *output.stride())
        _launch(forward_kernel, (query, key, value, output, lse), visits, strides, config, query, key, pattern, options)
        ctx.pattern, ctx.options = pattern, options
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        pattern, options = ctx.pattern, ctx.options
        batch, heads, _, head_dim = query.shape
        kv_heads, kv_len = key.shape[1], key.shape[2]
        delta = (grad.float() * output.float()).sum(-1)
        strides = (*query.stride(), *key.stride(), *value.stride(), *grad.stride())
        shared = (query, key, value, grad, lse, delta)
        config = _config("dq", query, pattern.block_size)
        grad_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        visits = index_tables(pattern, config.tile, query.device).rows
        _launch(dq_kernel, (*shared, grad_q), visits, strides, config, query, key, pattern, options)
        # One program per query head: a KV group's gradients are added up afterwards, in a fixed order.
        dtype = key.dtype if heads == kv_heads else torch.float32
        grad_k = torch.empty(batch, heads, kv_len, head_dim, dtype=dtype, device=key.device)
        grad_v = torch.empty_like(grad_k)
        config = _config("dkdv", query, pattern.block_size)
        visits = index_tables(pattern, config.tile, query.device).cols
        _launch(dkdv_kernel, (*shared, grad_k, grad_v), visits, strides, config, query, key, pattern, options)
        if heads != kv_heads:
            grouped = (batch, kv_heads, heads // kv_heads, kv_len, head_dim)
            grad_k, grad_v = (g.view(grouped).sum(2).to(key.dtype) for g in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    visits: Visits,
    strides: tuple[int, ...],
    config: LaunchConfig,
    query: Tensor,
    key: Tensor,
    pattern: BlockPattern,
    options: AttentionOptions,
) -> None:
    """One launch of any of the three kernels: a program per entry of `visits` and per sample."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    masks, mask_strides = _masks(options, (batch, heads, q_len, kv_len), query)
    width = padded_head_dim(head_dim)
    programs = visits.order.numel()
    if not programs or not batch:
        return
    with torch.cuda.device_of(query):
        kernel[(programs, batch)](
            *tensors, visits.start, visits.full, visits.index, visits.order, *masks, *strides, *mask_strides,
            heads, heads // kv_heads, programs // heads, q_len, kv_len, head_dim,
            _scale(options, head_dim), options.softcap or 1.0, options.dropout_p, options.seed or 0,
            TILE_Q=config.tile[0], TILE_K=config.tile[1], HEAD=width, CAUSAL=pattern.causal,
            HAS_KEY_MASK=options.key_mask is not None, HAS_ATTN_MASK=options.attn_mask is not None,
            SOFTCAP=options.softcap is not None, DROPOUT=options.dropout_p > 0, PADDED=width != head_dim,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _masks(
    options: AttentionOptions, shape: tuple[int, int, int, int], like: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Key mask (batch, kv_len) and attention mask as uint8, and their strides; stand-ins where there are none."""
    nothing = torch.empty(1, dtype=torch.uint8, device=like.device)
    key_mask, key_stride = nothing, 0
    if options.key_mask is not None:
        key_mask = options.key_mask.to(like.device).contiguous().view(torch.uint8)
        key_stride = key_mask.stride(0)
    attn_mask, strides = nothing, [0, 0, 0, 0]
    if options.attn_mask is not None:
        expanded = options.attn_mask.to(like.device).expand(shape)  # strides of 0: nothing is copied
        attn_mask, strides = expanded.view(torch.uint8), list(expanded.stride())
    return (key_mask, attn_mask), (key_stride, *strides)


def _scale(options: AttentionOptions, head_dim: int) -> float:
    return head_dim**-0.5 if options.scale is None else options.scale


def _config(kernel: Kernel, query: Tensor, block_size: tuple[int, int]) -> LaunchConfig:
    capability = 90
    if query.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(query.device)
        capability = 10 * major + minor
    return launch_config(kernel, capability, query.shape[3], query.dtype, block_size)
