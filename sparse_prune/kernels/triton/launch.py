"""Launches kernels on checked tensors."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.backward import dkdv_kernel, dq_kernel
from sparse_prune.kernels.triton.configs import LaunchConfig, mask_kinds, padded_head_dim
from sparse_prune.kernels.triton.decode import combine_kernel, decode_kernel
from sparse_prune.kernels.triton.forward import forward_kernel
from sparse_prune.kernels.triton.probe import probe_kernel

Tables = list[Tensor]
"""`Visits.tensors()`."""
_MOST_BYTES = 2**28
"""Most memory that the notes of one launch of the probe take; more heads take several launches."""


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, tables: Tables, config: LaunchConfig, causal: bool,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output, like `query`, and the base-2 log-sum-exp of each row, float32, (batch, num_heads, q_len)."""
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    strides = (*query.stride(), *key.stride(), *value.stride(), *output.stride())
    tensors = (query, key, value, output, lse)
    _launch(forward_kernel, tensors, tables, strides, config, query, key, causal, options, SPAN=config.span)
    return output, lse


def launch_dq(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, output: Tensor, lse: Tensor, tables: Tables,
    config: LaunchConfig, causal: bool, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the query's gradient, contiguous, and the row sum of the output times its gradient, for `launch_dkdv`.

    The latter, float32, (batch, num_heads, q_len), is what the softmax subtracts from every logit's gradient.
    """
    grad_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    delta = torch.empty_like(lse)
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad.stride(), *output.stride())
    tensors = (query, key, value, grad, output, lse, delta, grad_q)
    _launch(dq_kernel, tensors, tables, strides, config, query, key, causal, options)
    return grad_q, delta


def launch_dkdv(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, tables: Tables,
    config: LaunchConfig, causal: bool, options: AttentionOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of key and value, contiguous; `delta` as `launch_dq` gives it."""
    batch, kv_heads, kv_len, head_dim = key.shape
    members = heads_of_a_program(tables, query, key, config)
    parts = query.shape[1] // members
    # Where a program has one query head, a KV group's gradients are added up afterwards, in a fixed order.
    dtype = key.dtype if parts == kv_heads else torch.float32
    grad_k = torch.empty(batch, parts, kv_len, head_dim, dtype=dtype, device=key.device)
    grad_v = torch.empty_like(grad_k)
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad.stride())
    tensors = (query, key, value, grad, lse, delta, grad_k, grad_v)
    _launch(dkdv_kernel, tensors, tables, strides, config, query, key, causal, options, members, SHARED=members > 1)
    if parts == kv_heads:
        return grad_k, grad_v
    grouped = (batch, kv_heads, parts // kv_heads, kv_len, head_dim)
    return grad_k.view(grouped).sum(2).to(key.dtype), grad_v.view(grouped).sum(2).to(key.dtype)


def heads_of_a_program(tables: Tables, query: Tensor, key: Tensor, config: LaunchConfig) -> int:
    """Return how many query heads a program of dkdv takes, as the number of programs in its tables tells."""
    group, tiles = query.shape[1] // key.shape[1], -(-key.shape[2] // config.tile[1])
    return group if tables[-1].numel() == key.shape[1] * tiles else 1


def launch_probe(
    query: Tensor, key: Tensor, block_q: int, config: LaunchConfig, causal: bool, options: AttentionOptions,
    backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the sums of the probe over the rows of each tile, into which a block of `block_q` queries is split.

    Args:
        backward: Values, the gradient in the output, both of the query's type, and the kept blocks, uint8, (num_heads,
            q_blocks, kv_blocks): the sums are those of `scores.Influence`. None: of row mass.

    Returns:
        Sums, float32, (kinds, batch, num_heads, q_blocks, tiles, kv_blocks): the rise of the loss, or mass, squared
        mass and largest mass. How many rows may see a key, int32, (batch, num_heads, q_blocks, tiles).
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    tile, block_k = config.tile
    blocks, tiles, cols = -(-q_len // block_q), block_q // tile, -(-kv_len // block_k)
    kinds, numbers = (3, 1) if backward is None else (1, 2)
    value, grad, keep = backward or (key, query, key)  # stand-ins, which the kernel does not read
    sums = query.new_zeros(kinds, batch, heads, blocks, tiles, cols, dtype=torch.float32)
    shown = query.new_zeros(batch, heads, blocks, tiles, dtype=torch.int32)
    of_a_head = (batch, blocks * tiles, cols, numbers, tile)
    most = max(1, min(heads, _MOST_BYTES // max(1, 4 * math.prod(of_a_head))))
    notes = torch.empty(most, *of_a_head, dtype=torch.float32, device=query.device)
    masks, mask_strides, given = mask_arguments(options, (batch, heads, q_len, kv_len), query)
    width = padded_head_dim(head_dim)
    with torch.cuda.device_of(query):
        for first in range(0, heads, most):
            probe_kernel[(blocks * tiles, min(most, heads - first), batch)](
                query, key, value, grad, keep, notes, sums, shown, *masks,
                *query.stride(), *key.stride(), *value.stride(), *grad.stride(), *mask_strides, options.window or 0,
                first, heads, heads // kv_heads, blocks * tiles, cols, q_len, kv_len, head_dim,
                _scale(options, head_dim), options.softcap or 1.0,
                TILE_Q=tile, TILES=tiles, BLOCK_K=block_k, HEAD=width, GRADIENT=backward is not None, CAUSAL=causal,
                MASKS=given, SOFTCAP=options.softcap is not None, PADDED=width != head_dim,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return sums, shown


def launch_decode(
    query: Tensor, key: Tensor, value: Tensor, kv_len: int, visits: tuple[Tensor, Tensor, Tensor], keep: Tensor,
    first_row: int, block_size: tuple[int, int], config: LaunchConfig, splits: int, causal: bool,
    options: AttentionOptions,
) -> Tensor:  # fmt: skip
    """Compute the output of a decoding step, contiguous.

    `visits` are start, tiles and their places in memory, int32; `keep` is uint8, (num_heads, rows, kv_blocks), from
    query block `first_row` on.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    group, width = heads // kv_heads, padded_head_dim(head_dim)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    part = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(splits, *query.shape[:3], dtype=torch.float32, device=query.device)
    masks, mask_strides, kinds = mask_arguments(options, (batch, heads, q_len, kv_len), query)
    count = batch * heads * q_len
    if not count:
        return output
    with torch.cuda.device_of(query):
        decode_kernel[(kv_heads, splits, batch)](
            query, key, value, part, part_lse, *visits, keep, *masks,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides, options.window or 0,
            heads, group, q_len, kv_len, head_dim, splits, first_row, keep.shape[1], keep.shape[2],
            _scale(options, head_dim), options.softcap or 1.0,
            BLOCK_Q=block_size[0], TILES=block_size[1] // config.tile[1], TILE_K=config.tile[1],
            STACK=config.tile[0], HEAD=width, CAUSAL=causal, MASKS=kinds, SOFTCAP=options.softcap is not None,
            PADDED=width != head_dim, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        combine_kernel[(count,)](part, part_lse, output, splits, count, head_dim, HEAD=width, num_warps=1)
    return output


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], tables: Tables, strides: tuple[int, ...], config: LaunchConfig,
    query: Tensor, key: Tensor, causal: bool, options: AttentionOptions, members: int = 1, **constants: int,
) -> None:  # fmt: skip
    """Launch forward, dq or dkdv: a program, of `members` query heads, per program of the tables and per sample."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    masks, mask_strides, kinds = mask_arguments(options, (batch, heads, q_len, kv_len), query)
    width = padded_head_dim(head_dim)
    programs = tables[-1].numel()
    if not programs or not batch:
        return
    with torch.cuda.device_of(query):
        kernel[(programs, batch)](
            *tensors, *tables, *masks, *strides, *mask_strides, options.window or 0,
            heads, heads // kv_heads, programs * members // heads, q_len, kv_len, head_dim,
            _scale(options, head_dim), options.softcap or 1.0, options.dropout_p, options.seed or 0,
            TILE_Q=config.tile[0], TILE_K=config.tile[1], HEAD=width, CAUSAL=causal, MASKS=kinds,
            SOFTCAP=options.softcap is not None, DROPOUT=options.dropout_p > 0, PADDED=width != head_dim,
            **constants, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def mask_arguments(
    options: AttentionOptions, shape: tuple[int, int, int, int], like: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...], int]:
    """Return key mask, attention mask and documents, or stand-ins for them; their strides; which are given."""
    key_mask, attn_mask, documents = _stand_ins(like.device)
    strides: tuple[int, ...] = (0, 0, 0, 0, 0)
    if options.key_mask is not None:
        key_mask = options.key_mask.to(like.device).contiguous().view(torch.uint8)
        strides = (key_mask.stride(0), *strides[1:])
    if options.attn_mask is not None:
        expanded = options.attn_mask.to(like.device).expand(shape)  # strides of 0: nothing is copied
        attn_mask = expanded.view(torch.uint8)
        strides = (strides[0], *expanded.stride())
    if options.documents is not None:
        documents = options.documents.to(like.device, torch.int32).contiguous()
    return (key_mask, attn_mask, documents), strides, mask_kinds(options)


@cache
def _stand_ins(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Make tensors in place of masks that are not given, once: no kernel reads them."""
    nothing = torch.zeros(1, dtype=torch.uint8, device=device)
    return nothing, nothing, torch.zeros(1, dtype=torch.int32, device=device)


def _scale(options: AttentionOptions, head_dim: int) -> float:
    return head_dim**-0.5 if options.scale is None else options.scale
