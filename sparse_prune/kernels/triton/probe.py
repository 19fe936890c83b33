"""The probe kernel: row mass of dense attention per block, or what a block changes; no weight is held in memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from sparse_prune.kernels.triton.tiles import load_tile, scaled, unpadded, visible
from sparse_prune.scores.influence import LARGEST_LOGIT, LEAST_REST

_LEAST_REST = tl.constexpr(LEAST_REST)
_LARGEST = tl.constexpr(LARGEST_LOGIT / math.log(2.0))
_AT_A_TIME = tl.constexpr(16)
"""Blocks whose notes a program reads together."""


@triton.jit
def _note_blocks(
    top, total, expected, held, sees, q, g, begin, end, keep, notes, k_base, v_base, query, dims, key_mask, attn_mask,
    documents, stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
    q_len, kv_len, head_dim, scale, softcap,
    TILE_Q: tl.constexpr, BLOCK_K: tl.constexpr, GRADIENT: tl.constexpr, CAUSAL: tl.constexpr, MASKS: tl.constexpr,
    SOFTCAP: tl.constexpr, PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Note the mass of each row in blocks begin..end, and continue the online softmax, to which a block is one key.

    With a gradient the mean product of a block's values with it is noted, too, and the softmax is over kept blocks.
    """
    in_tile, in_block = tl.arange(0, TILE_Q), tl.arange(0, BLOCK_K)
    for block in tl.range(begin, end):
        first = block * BLOCK_K
        k = load_tile(k_base, first, in_block, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, ON_EDGE)
        logits, _ = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        if ON_EDGE or MASKS:
            seen = (query < q_len)[:, None] & visible(
                query[:, None], (first + in_block)[None, :], q_len, kv_len, key_mask, attn_mask, documents,
                stride_mask_q, stride_mask_k, window, CAUSAL, MASKS, ON_EDGE,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        if GRADIENT:
            v = load_tile(v_base, first, in_block, kv_len, dims, head_dim, stride_vt, stride_vd, PADDED, ON_EDGE)
            by_key = tl.dot(g, tl.trans(v), input_precision="ieee")
        largest = tl.max(logits, 1)
        weights = tl.exp2(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
        mass = tl.sum(weights, 1)
        mass = tl.where(mass == 0.0, 1.0, mass)
        log_mass = largest + tl.log2(mass)
        note = notes + block * (1 + GRADIENT) * TILE_Q + in_tile
        tl.store(note, log_mass)
        here = (log_mass != float("-inf")).to(tl.int32)  # or NaN
        sees = tl.maximum(sees, here)
        if GRADIENT:
            mean = tl.sum(weights * by_key, 1) / mass
            tl.store(note + TILE_Q, mean)
            kept = tl.load(keep + block).to(tl.int32)
            held += kept * here
            log_mass = tl.where(kept != 0, log_mass, float("-inf"))
        higher = tl.maximum(top, log_mass)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(log_mass - finite), tl.exp2(top - finite)
        total = total * fade + weight
        if GRADIENT:
            expected = expected * fade + weight * mean
        top = higher
    return top, total, expected, held, sees


@triton.jit(do_not_specialize=["first_head", "q_len", "kv_len"])
def probe_kernel(
    q, k, v, grad_out, keep, notes, sums, shown, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    first_head, heads, group, tiles, blocks_k, q_len, kv_len, head_dim, scale, softcap,
    TILE_Q: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, GRADIENT: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes sums (kinds, batch, heads, tiles, blocks_k) over a tile's rows, and shown (batch, heads, tiles): how many
    of its rows may see any key.

    One program per (tile of queries, head from `first_head` on, sample), `TILES` to a block. One pass over the blocks
    multiplies. Of each row and block it notes log2 of the mass before the softmax, and it finds the log-sum-exp of the
    rows. From both follows the mass of each block: its sum, the sum of its squares and its maximum are the three kinds.

    With `GRADIENT` the log-sum-exp is that of the kept blocks (uint8, (heads, blocks_q, blocks_k)), the mean product of
    a block's values with `grad_out` is noted as well, and the one kind of sum is the rise of `scores.Influence`.
    Without it `v`, `grad_out` and `keep` are not read.
    """
    # The last rows of a causal pattern see the most: they start first.
    tile = tiles - 1 - tl.program_id(0)
    head, sample = first_head + tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, in_tile, dims = tile * TILE_Q, tl.arange(0, TILE_Q), tl.arange(0, HEAD)
    query = first + in_tile
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_tile, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    g_tile = q_tile
    if GRADIENT:
        g_tile = load_tile(grad_out + sample * stride_gb + head.to(tl.int64) * stride_gh, first, in_tile, q_len, dims,
                           head_dim, stride_gt, stride_gd, PADDED, True)  # fmt: skip
    kv_head = (head // group).to(tl.int64)
    k_base, v_base = k + sample * stride_kb + kv_head * stride_kh, v + sample * stride_vb + kv_head * stride_vh
    mask_base = attn_mask + sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    query = unpadded(query, key_mask, q_len, kv_len, MASKS)
    documents += sample * kv_len
    keep += (head * tl.cdiv(tiles, TILES) + tile // TILES) * blocks_k
    notes += ((sample * tl.num_programs(1) + tl.program_id(1)) * tiles + tile) * blocks_k * ((1 + GRADIENT) * TILE_Q)
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
            notes, k_base, v_base, query, dims, key_mask, mask_base, documents,
            stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap,
            TILE_Q, BLOCK_K, GRADIENT, CAUSAL, MASKS, SOFTCAP, PADDED, edge == 1,
        )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("inf"), top + tl.log2(some))
    tl.debug_barrier()  # threads read what others have noted
    row = (sample * heads + head) * tiles + tile
    plane = tl.num_programs(2).to(tl.int64) * heads * tiles * blocks_k
    for start in tl.range(0, count, _AT_A_TIME):
        block = start + tl.arange(0, _AT_A_TIME)
        there = block < count
        note = notes + block[:, None] * ((1 + GRADIENT) * TILE_Q) + in_tile[None, :]
        place = sums + row * blocks_k + block
        log_mass = tl.load(note, mask=there[:, None], other=float("-inf"))
        if GRADIENT:
            mass = tl.exp2(tl.minimum(log_mass - lse[None, :], _LARGEST))
            mean = tl.load(note + TILE_Q, mask=there[:, None], other=0.0)
            kept = tl.load(keep + block, mask=there, other=0).to(tl.int32)[:, None]
            rest = tl.where(kept != 0, tl.maximum(1.0 - mass, _LEAST_REST), 1.0 + mass)
            # A row that keeps nothing, or nothing else, has no softmax without the block.
            stays = held[None, :] > kept * (log_mass != float("-inf")).to(tl.int32)
            rise = tl.where(stays, mass * ((expected / some)[None, :] - mean) / rest, 0.0)
            tl.store(place, tl.sum(rise, 1), mask=there)
        else:
            mass = tl.exp2(log_mass - lse[None, :])
            tl.store(place, tl.sum(mass, 1), mask=there)
            tl.store(place + plane, tl.sum(mass * mass, 1), mask=there)
            tl.store(place + 2 * plane, tl.max(mass, 1), mask=there)
    tl.store(shown + row, tl.sum(tl.where(query < q_len, sees, 0), 0))
