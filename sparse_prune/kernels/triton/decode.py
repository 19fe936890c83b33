"""The decode kernels: few queries against the kept blocks of a long cache.

The query heads of a KV group are stacked into one tile, so that each key is read once; which of them keeps a block is
looked up per head. The visits are split over programs, whose partial softmaxes a second kernel joins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_prune.kernels.triton.tiles import load_tile, scaled, visible


@triton.jit(do_not_specialize=["q_len", "kv_len", "splits", "first_row", "cols"])
def decode_kernel(
    q, k, v, part, part_lse, start, index, place, keep, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, q_len, kv_len, head_dim, splits, first_row, rows, cols, scale, softcap,
    BLOCK_Q: tl.constexpr, TILES: tl.constexpr, TILE_K: tl.constexpr, STACK: tl.constexpr, HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes part (splits, batch, heads, q_len, head_dim) and part_lse (splits, batch, heads, q_len), base 2.

    One program per (key head, split, sample). `keep` is uint8, (heads, rows, cols), for the query blocks from
    `first_row` on; `index` lists, per key head, the key tiles that any of its heads keeps for any of these rows, and
    `place` where in memory each of them stands.
    """
    kv_head, split, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    stacked = tl.arange(0, STACK)
    real = stacked < group * q_len
    head = kv_head * group + tl.where(real, stacked // q_len, 0)
    query = tl.where(real, stacked % q_len, 0)
    dims, in_tile = tl.arange(0, HEAD), tl.arange(0, TILE_K)
    row_start = sample * stride_qb + head.to(tl.int64) * stride_qh + query.to(tl.int64) * stride_qt
    inside = real[:, None]
    if PADDED:
        inside = inside & (dims < head_dim)[None, :]
    q_tile = tl.load(q + row_start[:, None] + dims[None, :] * stride_qd, mask=inside, other=0.0)
    row = (query + (kv_len - q_len)) // BLOCK_Q - first_row
    keep_row = keep + (head * rows + row) * cols
    k_base = k + sample * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = v + sample * stride_vb + kv_head.to(tl.int64) * stride_vh
    mask_base = attn_mask + sample * stride_mask_b + (head.to(tl.int64) * stride_mask_h)[:, None]
    key_mask += sample * stride_pb
    documents += sample * kv_len
    first, last = tl.load(start + kv_head), tl.load(start + kv_head + 1)
    share = tl.cdiv(last - first, splits)
    begin = first + split * share
    stop = tl.minimum(begin + share, last)
    acc = tl.zeros([STACK, HEAD], tl.float32)
    top = tl.full([STACK], float("-inf"), tl.float32)
    total = tl.zeros([STACK], tl.float32)
    for visit in tl.range(begin, stop):
        tile = tl.load(index + visit)
        first_slot = tl.load(place + visit) * TILE_K
        key = tile * TILE_K + in_tile
        end = first_slot + kv_len - tile * TILE_K
        k_tile = load_tile(k_base, first_slot, in_tile, end, dims, head_dim, stride_kt, stride_kd, PADDED, True)
        logits, _ = scaled(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scale, softcap, SOFTCAP)
        kept = tl.load(keep_row + tile // TILES, mask=real, other=0) != 0
        seen = kept[:, None] & visible(
            query[:, None], key[None, :], q_len, kv_len, key_mask, mask_base, documents, stride_mask_q, stride_mask_k,
            window, CAUSAL, MASKS, True,
        )  # fmt: skip
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(weights, 1)
        v_tile = load_tile(v_base, first_slot, in_tile, end, dims, head_dim, stride_vt, stride_vd, PADDED, True)
        acc = acc * fade[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out_row = ((split * tl.num_programs(2) + sample) * heads + head) * q_len + query
    tl.store(part + out_row[:, None] * head_dim + dims[None, :], acc, mask=real[:, None] & (dims < head_dim)[None, :])
    # A split that saw no key weighs nothing.
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(part_lse + out_row, lse, mask=real)


@triton.jit(do_not_specialize=["splits", "count"])
def combine_kernel(part, part_lse, out, splits, count, head_dim, HEAD: tl.constexpr):
    """Joins the splits: out (count, head_dim), one program per row; rows that saw no key are zero."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HEAD)
    acc = tl.zeros([HEAD], tl.float32)
    top = float("-inf")
    total = 0.0
    for split in tl.range(0, splits):
        lse = tl.load(part_lse + split * count + row)
        higher = tl.maximum(top, lse)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(lse - finite), tl.exp2(top - finite)
        values = tl.load(part + (split * count + row) * head_dim + dims, mask=dims < head_dim, other=0.0)
        acc = acc * fade + weight * values
        total = total * fade + weight
        top = higher
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * head_dim + dims, acc.to(out.dtype.element_ty), mask=dims < head_dim)
