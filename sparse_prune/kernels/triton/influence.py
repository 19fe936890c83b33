"""The probe of the backward pass: by how much a loss rises per block, nothing of the attention materialised."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import Call, padded_head_dim, probe_config, traits
from sparse_prune.kernels.triton.launch import mask_arguments
from sparse_prune.kernels.triton.tables import sent
from sparse_prune.kernels.triton.tiles import load_tile, scaled, visible
from sparse_prune.pattern import BlockPattern
from sparse_prune.scores import BlockStatistics, Influence
from sparse_prune.scores.call import mask_heads
from sparse_prune.scores.influence import LARGEST_LOGIT, LEAST_REST

_MOST_ROWS = 64
"""Of a program: it holds two products of its rows with a block of keys."""


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def influence_kernel(
    q, k, v, grad_out, keep, rises, shown, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, tiles, blocks_k, q_len, kv_len, head_dim, scale, softcap, least_rest, largest,
    TILE_Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes rises (batch, heads, tiles, blocks_k), summed over a tile's rows, and shown (batch, heads, tiles): whether
    a row of it may see any key.

    One program per (tile of queries, head, sample), `TILES` to a block. A first pass over the kept blocks (uint8,
    (heads, blocks_q, blocks_k)) finds the log-sum-exp of its rows and the expected product with the gradient, a second
    what each block, kept or not, changes: `scores.Influence` has the formula.
    """
    # The last rows of a causal pattern see the most: they start first.
    tile = tiles - 1 - tl.program_id(0)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, in_tile, in_block, dims = tile * TILE_Q, tl.arange(0, TILE_Q), tl.arange(0, BLOCK_K), tl.arange(0, HEAD)
    query = first + in_tile
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_tile, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    g_tile = load_tile(grad_out + sample * stride_gb + head.to(tl.int64) * stride_gh, first, in_tile, q_len, dims,
                       head_dim, stride_gt, stride_gd, PADDED, True)  # fmt: skip
    kv_head = (head // group).to(tl.int64)
    k_base, v_base = k + sample * stride_kb + kv_head * stride_kh, v + sample * stride_vb + kv_head * stride_vh
    attn_mask += sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    documents += sample * kv_len
    keep += (head * tl.cdiv(tiles, TILES) + tile // TILES) * blocks_k
    count = blocks_k
    if CAUSAL:
        last = tl.minimum(first + TILE_Q, q_len) + kv_len - q_len
        count = tl.minimum(tl.maximum(tl.cdiv(last, BLOCK_K), 0), blocks_k)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    expected = tl.zeros([TILE_Q], tl.float32)
    held = tl.zeros([TILE_Q], tl.int32)
    for block in tl.range(0, count):
        if tl.load(keep + block) != 0:
            logits, by_key = _block(
                q_tile, g_tile, k_base, v_base, query, block * BLOCK_K, in_block, dims, key_mask, attn_mask, documents,
                stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window, q_len, kv_len,
                head_dim, scale, softcap, CAUSAL, MASKS, SOFTCAP, PADDED,
            )  # fmt: skip
            largest_here = tl.max(logits, 1)
            higher = tl.maximum(top, largest_here)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            weights, fade = tl.exp2(logits - finite[:, None]), tl.exp2(top - finite)
            total = total * fade + tl.sum(weights, 1)
            expected = expected * fade + tl.sum(weights * by_key, 1)
            held += (largest_here > float("-inf")).to(tl.int32)
            top = higher
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), top + tl.log2(some))
    expected = expected / some
    place = ((sample * heads + head) * tiles + tile) * blocks_k
    sees = tl.zeros([TILE_Q], tl.int32)
    for block in tl.range(0, count):
        logits, by_key = _block(
            q_tile, g_tile, k_base, v_base, query, block * BLOCK_K, in_block, dims, key_mask, attn_mask, documents,
            stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window, q_len, kv_len,
            head_dim, scale, softcap, CAUSAL, MASKS, SOFTCAP, PADDED,
        )  # fmt: skip
        kept = tl.load(keep + block) != 0
        weights = tl.exp2(tl.minimum(logits - lse[:, None], largest))
        mass = tl.sum(weights, 1)
        change = tl.sum(weights * (by_key - expected[:, None]), 1)
        here = (tl.max(logits, 1) > float("-inf")).to(tl.int32)
        sees = tl.maximum(sees, here)
        rest = tl.where(kept, tl.maximum(1.0 - mass, least_rest), 1.0 + mass)
        # A row that keeps nothing, or nothing else, has no softmax without the block.
        stays = held - tl.where(kept, here, 0) > 0
        tl.store(rises + place + block, tl.sum(tl.where(stays, -change / rest, 0.0), 0))
    tl.store(shown + (sample * heads + head) * tiles + tile, tl.max(tl.where(query < q_len, sees, 0), 0))


@triton.jit
def _block(
    q, g, k_base, v_base, query, first, in_block, dims, key_mask, attn_mask, documents, stride_kt, stride_kd, stride_vt,
    stride_vd, stride_mask_q, stride_mask_k, window, q_len, kv_len, head_dim, scale, softcap, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Masked logits in units of log2, and products of the gradient with the values, of one block of keys."""
    k = load_tile(k_base, first, in_block, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, True)
    logits, _ = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    key = first + in_block
    seen = (query < q_len)[:, None] & visible(
        query[:, None], key[None, :], q_len, kv_len, key_mask, attn_mask, documents, stride_mask_q, stride_mask_k,
        window, CAUSAL, MASKS, True,
    )  # fmt: skip
    v = load_tile(v_base, first, in_block, kv_len, dims, head_dim, stride_vt, stride_vd, PADDED, True)
    return tl.where(seen, logits, float("-inf")), tl.dot(g, tl.trans(v), input_precision="ieee")


def influence_tile(block_size: tuple[int, int]) -> int:
    """Return the rows of a program; they divide a block."""
    return min(block_size[0], _MOST_ROWS)


def probe_influence(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, block_size: tuple[int, int], *, causal: bool,
    options: AttentionOptions, pattern: BlockPattern | None,
) -> BlockStatistics:  # fmt: skip
    """Launch the kernel of `scores.Influence`, without a host synchronisation; arguments as in `probe_score`.

    Query, key and value have one type and width, the gradient any floating type; options hide padded queries.

    Raises:
        ValueError: If `configs.probe_config` refuses head or block.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    config = probe_config(Call(head_dim, query.dtype, block_size, *traits(options)))
    tile = influence_tile(block_size)
    blocks, tiles, cols = -(-q_len // block_size[0]), block_size[0] // tile, -(-kv_len // block_size[1])
    # The sums are linear in the gradient: of size 1 it suits every type.
    size = gradient.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    unit = (gradient / size).to(query.dtype)
    if pattern is None:
        keep = torch.ones(heads, blocks, cols, dtype=torch.uint8, device=query.device)
    else:
        keep = sent(pattern.keep.to(torch.uint8).contiguous(), query.device)
    rises = torch.zeros(batch, heads, blocks * tiles, cols, dtype=torch.float32, device=query.device)
    shown = torch.zeros(batch, heads, blocks * tiles, dtype=torch.int32, device=query.device)
    masks, mask_strides, kinds = mask_arguments(options, (batch, heads, q_len, kv_len), query)
    width = padded_head_dim(head_dim)
    with torch.cuda.device_of(query):
        influence_kernel[(blocks * tiles, heads, batch)](
            query, key, value, unit, keep, rises, shown, *masks,
            *query.stride(), *key.stride(), *value.stride(), *unit.stride(), *mask_strides, options.window or 0,
            heads, heads // kv_heads, blocks * tiles, cols, q_len, kv_len, head_dim,
            head_dim**-0.5 if options.scale is None else options.scale, options.softcap or 1.0,
            LEAST_REST, LARGEST_LOGIT / math.log(2.0),
            TILE_Q=tile, TILES=tiles, BLOCK_K=block_size[1], HEAD=width, CAUSAL=causal, MASKS=kinds,
            SOFTCAP=options.softcap is not None, PADDED=width != head_dim,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    sums = rises.double().unflatten(2, (blocks, tiles)).sum((0, 3)) * size
    alike = mask_heads(options.attn_mask) == 1
    seen = shown.amax((0, 1) if alike else 0, keepdim=True)
    counts = seen.unflatten(2, (blocks, tiles)).amax(3, keepdim=True).double()
    return BlockStatistics(sums[None], counts, (Influence().kind,))
