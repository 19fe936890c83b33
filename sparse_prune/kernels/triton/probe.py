"""The probe kernel: row-mass statistics of dense attention per block, nothing of it materialised."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_prune.kernels.triton.tiles import load_tile, scaled, unpadded, visible


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def probe_kernel(
    q, k, sums, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, blocks_q, blocks_k, q_len, kv_len, head_dim, scale, softcap,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Writes sums (3, batch, heads, blocks_q, blocks_k): mass, squared mass, largest mass over the block's rows.

    One program per (block of queries, head, sample): a first pass finds the log-sum-exp of its rows, a second the mass
    of each block.
    """
    # The last rows of a causal pattern see the most: they start first.
    row = blocks_q - 1 - tl.program_id(0)
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, in_row, in_block, dims = row * BLOCK_Q, tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, HEAD)
    query = first + in_row
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_row, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    k_base = k + sample * stride_kb + (head // group).to(tl.int64) * stride_kh
    attn_mask += sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    query = unpadded(query, key_mask, q_len, kv_len, MASKS)
    documents += sample * kv_len
    count = blocks_k
    if CAUSAL:
        last = tl.minimum((row + 1) * BLOCK_Q, q_len) + kv_len - q_len
        count = tl.minimum(tl.maximum(tl.cdiv(last, BLOCK_K), 0), blocks_k)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for block in tl.range(0, count):
        logits = _logits(
            q_tile, k_base, query, block * BLOCK_K, in_block, dims, key_mask, attn_mask, documents,
            stride_kt, stride_kd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap, CAUSAL, MASKS, SOFTCAP, PADDED,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        top = higher
    empty = (total == 0.0) | (query >= q_len)
    lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    plane = tl.num_programs(2).to(tl.int64) * heads * blocks_q * blocks_k
    place = ((sample * heads + head) * blocks_q + row) * blocks_k
    for block in tl.range(0, count):
        logits = _logits(
            q_tile, k_base, query, block * BLOCK_K, in_block, dims, key_mask, attn_mask, documents,
            stride_kt, stride_kd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap, CAUSAL, MASKS, SOFTCAP, PADDED,
        )  # fmt: skip
        mass = tl.sum(tl.exp2(logits - lse[:, None]), 1)
        tl.store(sums + place + block, tl.sum(mass, 0))
        tl.store(sums + plane + place + block, tl.sum(mass * mass, 0))
        tl.store(sums + 2 * plane + place + block, tl.max(mass, 0))


@triton.jit
def _logits(
    q, k_base, query, first, in_block, dims, key_mask, attn_mask, documents, stride_kt, stride_kd,
    stride_mask_q, stride_mask_k, window,
    q_len, kv_len, head_dim, scale, softcap, CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Masked logits of one block in units of log2."""
    k = load_tile(k_base, first, in_block, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, True)
    key = first + in_block
    logits, _ = scaled(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    seen = visible(
        query[:, None], key[None, :], q_len, kv_len, key_mask, attn_mask, documents, stride_mask_q, stride_mask_k,
        window,
        CAUSAL, MASKS, True,
    )  # fmt: skip
    return tl.where(seen, logits, float("-inf"))
