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
from sparse_prune.kernels.triton.tiles import load_tile, scaled, unpadded, visible
from sparse_prune.pattern import BlockPattern
from sparse_prune.scores import BlockStatistics, Influence
from sparse_prune.scores.call import mask_heads
from sparse_prune.scores.influence import LARGEST_LOGIT, LEAST_REST

_MOST_ROWS = 64
"""Of a program: it holds two products of its rows with a block of keys. An attention mask needs registers too."""
_MOST_BYTES = 2**28
"""Of what the programs of a launch note; more heads take several launches."""


@triton.jit
def _note_blocks(
    top, total, expected, held, sees, q, g, begin, end, keep, found, k_base, v_base, query, dims, key_mask, attn_mask,
    documents, stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
    q_len, kv_len, head_dim, scale, softcap,
    TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Note what blocks begin..end have to give; the kept ones are, each as one key, those of an online softmax."""
    in_tile, in_block = tl.arange(0, TILE_Q), tl.arange(0, BLOCK_K)
    for block in tl.range(begin, end):
        first = block * BLOCK_K
        k = load_tile(k_base, first, in_block, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, ON_EDGE)
        v = load_tile(v_base, first, in_block, kv_len, dims, head_dim, stride_vt, stride_vd, PADDED, ON_EDGE)
        logits, _ = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        if ON_EDGE or MASKS:
            seen = (query < q_len)[:, None] & visible(
                query[:, None], (first + in_block)[None, :], q_len, kv_len, key_mask, attn_mask, documents,
                stride_mask_q, stride_mask_k, window, CAUSAL, MASKS, ON_EDGE,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        by_key = tl.dot(g, tl.trans(v), input_precision="ieee")
        largest = tl.max(logits, 1)
        weights = tl.exp2(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
        mass = tl.sum(weights, 1)
        mass = tl.where(mass == 0.0, 1.0, mass)
        log_mass, mean = largest + tl.log2(mass), tl.sum(weights * by_key, 1) / mass
        tl.store(found + block * 2 * TILE_Q + in_tile, log_mass)
        tl.store(found + (block * 2 + 1) * TILE_Q + in_tile, mean)
        here = (largest > float("-inf")).to(tl.int32)
        sees = tl.maximum(sees, here)
        kept = tl.load(keep + block).to(tl.int32)
        held += kept * here
        logit = tl.where(kept != 0, log_mass, float("-inf"))
        higher = tl.maximum(top, logit)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(logit - finite), tl.exp2(top - finite)
        total = total * fade + weight
        expected = expected * fade + weight * mean
        top = higher
    return top, total, expected, held, sees


@triton.jit(do_not_specialize=["first_head", "q_len", "kv_len"])
def influence_kernel(
    q, k, v, grad_out, keep, found, rises, shown, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    first_head, heads, group, tiles, blocks_k, q_len, kv_len, head_dim, scale, softcap, least_rest, largest,
    TILE_Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, AT_A_TIME: tl.constexpr, HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes rises (batch, heads, tiles, blocks_k), summed over a tile's rows, and shown (batch, heads, tiles): whether
    a row of it may see any key.

    One program per (tile of queries, head from `first_head` on, sample), `TILES` to a block. One pass over the blocks,
    kept ones (uint8, (heads, blocks_q, blocks_k)) and others, multiplies. Of each row and block it notes two numbers,
    log2 of the mass before the softmax and the mean of the products with the gradient, and it finds the log-sum-exp of
    the rows over their kept blocks and the expected product. What each block changes follows from these, by the formula
    of `scores.Influence`.
    """
    # The last rows of a causal pattern see the most: they start first.
    tile = tiles - 1 - tl.program_id(0)
    head, sample = first_head + tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, in_tile, dims = tile * TILE_Q, tl.arange(0, TILE_Q), tl.arange(0, HEAD)
    query = first + in_tile
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_tile, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    g_tile = load_tile(grad_out + sample * stride_gb + head.to(tl.int64) * stride_gh, first, in_tile, q_len, dims,
                       head_dim, stride_gt, stride_gd, PADDED, True)  # fmt: skip
    kv_head = (head // group).to(tl.int64)
    k_base, v_base = k + sample * stride_kb + kv_head * stride_kh, v + sample * stride_vb + kv_head * stride_vh
    mask_base = attn_mask + sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    query = unpadded(query, key_mask, q_len, kv_len, MASKS)
    documents += sample * kv_len
    keep += (head * tl.cdiv(tiles, TILES) + tile // TILES) * blocks_k
    found += ((sample * tl.num_programs(1) + tl.program_id(1)) * tiles + tile) * blocks_k * (2 * TILE_Q)
    # Blocks that no mask but the given ones cuts come first.
    count, whole = blocks_k, kv_len // BLOCK_K
    if CAUSAL:
        last = tl.minimum(first + TILE_Q, q_len) + kv_len - q_len
        count = tl.minimum(tl.maximum(tl.cdiv(last, BLOCK_K), 0), blocks_k)
        whole = tl.minimum(tl.maximum(first + kv_len - q_len + 1, 0) // BLOCK_K, whole)
    whole = tl.where(first + TILE_Q <= q_len, whole, 0)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    expected = tl.zeros([TILE_Q], tl.float32)
    held = tl.zeros([TILE_Q], tl.int32)
    sees = tl.zeros([TILE_Q], tl.int32)
    for edge in tl.static_range(2):
        top, total, expected, held, sees = _note_blocks(
            top, total, expected, held, sees, q_tile, g_tile, whole if edge else 0, count if edge else whole, keep,
            found, k_base, v_base, query, dims, key_mask, mask_base, documents,
            stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap, TILE_Q, BLOCK_K, CAUSAL, MASKS, SOFTCAP, PADDED, edge == 1,
        )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), top + tl.log2(some))
    expected = expected / some
    tl.debug_barrier()  # threads read what others have noted
    row = (sample * heads + head) * tiles + tile
    for start in tl.range(0, count, AT_A_TIME):
        block = start + tl.arange(0, AT_A_TIME)
        there = block < count
        place = found + block[:, None] * (2 * TILE_Q) + in_tile[None, :]
        log_mass = tl.load(place, mask=there[:, None], other=float("-inf"))
        mean = tl.load(place + TILE_Q, mask=there[:, None], other=0.0)
        kept = tl.load(keep + block, mask=there, other=0).to(tl.int32)[:, None]
        mass = tl.exp2(tl.minimum(log_mass - lse[None, :], largest))
        rest = tl.where(kept != 0, tl.maximum(1.0 - mass, least_rest), 1.0 + mass)
        # A row that keeps nothing, or nothing else, has no softmax without the block.
        stays = held[None, :] > kept * (log_mass > float("-inf")).to(tl.int32)
        rise = tl.where(stays, mass * (expected[None, :] - mean) / rest, 0.0)
        tl.store(rises + row * blocks_k + block, tl.sum(rise, 1), mask=there)
    tl.store(shown + row, tl.max(tl.where(query < q_len, sees, 0), 0))


def probe_influence(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, block_size: tuple[int, int], *, causal: bool,
    options: AttentionOptions, pattern: BlockPattern | None,
) -> BlockStatistics:  # fmt: skip
    """Launch the kernel of `scores.Influence`, without a host synchronisation; arguments as in `probe_score`.

    Query, key and value have one type and width, the gradient any floating type; options name a scale and no dropout.

    Raises:
        ValueError: If `configs.probe_config` refuses head or block.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    config = probe_config(Call(head_dim, query.dtype, block_size, *traits(options)))
    tile = min(block_size[0], _MOST_ROWS if options.attn_mask is None else _MOST_ROWS // 2)
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
    noted = (batch, blocks * tiles, cols, 2, tile)  # of a head, float32
    most = max(1, min(heads, _MOST_BYTES // (4 * math.prod(noted))))
    found = torch.empty(most, *noted, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        for first in range(0, heads, most):
            influence_kernel[(blocks * tiles, min(most, heads - first), batch)](
                query, key, value, unit, keep, found, rises, shown, *masks,
                *query.stride(), *key.stride(), *value.stride(), *unit.stride(), *mask_strides, options.window or 0,
                first, heads, heads // kv_heads, blocks * tiles, cols, q_len, kv_len, head_dim,
                head_dim**-0.5 if options.scale is None else options.scale, options.softcap or 1.0,
                LEAST_REST, LARGEST_LOGIT / math.log(2.0),
                TILE_Q=tile, TILES=tiles, BLOCK_K=block_size[1], AT_A_TIME=16, HEAD=width, CAUSAL=causal, MASKS=kinds,
                SOFTCAP=options.softcap is not None, PADDED=width != head_dim,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    sums = rises.double().unflatten(2, (blocks, tiles)).sum((0, 3)) * size
    alike = mask_heads(options.attn_mask) == 1
    seen = shown.amax((0, 1) if alike else 0, keepdim=True)
    counts = seen.unflatten(2, (blocks, tiles)).amax(3, keepdim=True).double()
    return BlockStatistics(sums[None], counts, (Influence().kind,))
