"""The backward kernels: query gradients over rows of the pattern, key and value gradients over its columns.

Both recompute the weights from the log-sum-exp; neither needs atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_prune.kernels.triton import tables
from sparse_prune.kernels.triton.tiles import dropout_factor, load_tile, scaled, visible

MEMBER_BIT = tl.constexpr(tables.MEMBER_BIT)


@triton.jit
def _gradients(
    products, weight_grad, lse, delta, query, key, head, key_mask, attn_mask, documents, stride_mask_q, stride_mask_k,
    window,
    q_len, kv_len, scale, softcap, dropout_p, seed, CAUSAL: tl.constexpr, MASKS: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Return the weights that the forward pass used and the gradient of the scaled products, both like `products`."""
    logits, slope = scaled(products, scale, softcap, SOFTCAP)
    weights = tl.exp2(logits - lse)
    if ON_EDGE or MASKS:
        seen = visible(
            query, key, q_len, kv_len, key_mask, attn_mask, documents, stride_mask_q, stride_mask_k, window,
            CAUSAL, MASKS, ON_EDGE,
        )  # fmt: skip
        weights = tl.where(seen, weights, 0.0)
    used = weights
    if DROPOUT:
        factor = dropout_factor(seed, head, query, key, dropout_p)
        used = weights * factor
        weight_grad = weight_grad * factor
    return used, weights * (weight_grad - delta) * slope


@triton.jit
def _visit_keys(
    grad, q, g, lse, delta, begin, end, index, k_base, v_base, query, dims, head, key_mask, attn_mask, documents,
    stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
    q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_K: tl.constexpr, CAUSAL: tl.constexpr, MASKS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of a tile of queries what the key tiles of visits begin..end contribute."""
    in_tile = tl.arange(0, TILE_K)
    block = tl.load(index + begin)
    for visit in tl.range(begin, end):
        following = tl.load(index + visit + 1)
        first = block * TILE_K
        key = first + in_tile
        k = load_tile(k_base, first, in_tile, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, ON_EDGE)
        v = load_tile(v_base, first, in_tile, kv_len, dims, head_dim, stride_vt, stride_vd, PADDED, ON_EDGE)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        weight_grad = tl.dot(g, tl.trans(v), input_precision="ieee")
        _, logit_grad = _gradients(
            products, weight_grad, lse[:, None], delta[:, None], query[:, None], key[None, :], head, key_mask,
            attn_mask, documents,
            stride_mask_q, stride_mask_k, window, q_len, kv_len, scale, softcap, dropout_p, seed,
            CAUSAL, MASKS, SOFTCAP, DROPOUT, ON_EDGE,
        )  # fmt: skip
        grad += tl.dot(logit_grad.to(k.dtype), k, input_precision="ieee")
        block = following
    return grad


@triton.jit(do_not_specialize=["q_len", "kv_len", "seed"])
def dq_kernel(
    q, k, v, grad_out, out, lse, delta, grad_q, start, full, index, order, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_ob, stride_oh, stride_ot, stride_od,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, tiles, q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Writes grad_q, contiguous (batch, heads, q_len, head_dim), and delta, which `dkdv_kernel` reads.

    delta, (batch, heads, q_len), is the row sum of the output times its gradient.
    """
    program = tl.load(order + tl.program_id(0))
    sample = tl.program_id(1).to(tl.int64)
    head, tile = program // tiles, program % tiles
    kv_head = (head // group).to(tl.int64)
    flat_head = sample * heads + head
    first, in_tile, dims = tile * TILE_Q, tl.arange(0, TILE_Q), tl.arange(0, HEAD)
    query = first + in_tile
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_tile, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    g_tile = load_tile(grad_out + sample * stride_gb + head.to(tl.int64) * stride_gh, first, in_tile, q_len, dims,
                       head_dim, stride_gt, stride_gd, PADDED, True)  # fmt: skip
    # Queries past the end have no weights: exp2(x - inf) = 0.
    row_lse = tl.load(lse + flat_head * q_len + query, mask=query < q_len, other=float("inf"))
    out_tile = load_tile(out + sample * stride_ob + head.to(tl.int64) * stride_oh, first, in_tile, q_len, dims,
                         head_dim, stride_ot, stride_od, PADDED, True)  # fmt: skip
    row_delta = tl.sum(g_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + flat_head * q_len + query, row_delta, mask=query < q_len)
    k_base, v_base = k + sample * stride_kb + kv_head * stride_kh, v + sample * stride_vb + kv_head * stride_vh
    mask_base = attn_mask + sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    documents += sample * kv_len
    begin, end = tl.load(start + program), tl.load(start + program + 1)
    middle = begin + tl.load(full + program)
    grad = tl.zeros([TILE_Q, HEAD], tl.float32)
    for edge in tl.static_range(2):
        grad = _visit_keys(
            grad, q_tile, g_tile, row_lse, row_delta, middle if edge else begin, end if edge else middle, index, k_base,
            v_base, query, dims, flat_head.to(tl.int32), key_mask, mask_base, documents,
            stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
            TILE_K, CAUSAL, MASKS, SOFTCAP, DROPOUT, PADDED, edge == 1,
        )  # fmt: skip
    place = (flat_head * q_len + query)[:, None] * head_dim + dims[None, :]
    inside = (query < q_len)[:, None] & (dims < head_dim)[None, :]
    tl.store(grad_q + place, (grad * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _visit_queries(
    grad_k, grad_v, k, v, begin, end, index, q_base, g_base, lse, delta, key, dims, head, key_mask, attn_mask,
    documents,
    stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_mask_h, stride_mask_q, stride_mask_k,
    window, q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_Q: tl.constexpr, SHARED: tl.constexpr, CAUSAL: tl.constexpr, MASKS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a tile of keys and its values what the query tiles of visits begin..end contribute."""
    in_tile = tl.arange(0, TILE_Q)
    visited = tl.load(index + begin)
    for visit in tl.range(begin, end):
        following = tl.load(index + visit + 1)
        member, block = 0, visited
        if SHARED:
            member = visited >> MEMBER_BIT
            block = visited - (member << MEMBER_BIT)
        member64 = tl.cast(member, tl.int64)
        first = block * TILE_Q
        query = first + in_tile
        q = load_tile(q_base + member64 * stride_qh, first, in_tile, q_len, dims, head_dim, stride_qt, stride_qd,
                      PADDED, ON_EDGE)  # fmt: skip
        g = load_tile(g_base + member64 * stride_gh, first, in_tile, q_len, dims, head_dim, stride_gt, stride_gd,
                      PADDED, ON_EDGE)  # fmt: skip
        row = member64 * q_len + query
        if ON_EDGE:
            row_lse = tl.load(lse + row, mask=query < q_len, other=float("inf"))
            row_delta = tl.load(delta + row, mask=query < q_len, other=0.0)
        else:
            row_lse, row_delta = tl.load(lse + row), tl.load(delta + row)
        # Keys by queries: both products below then need no transposed weights.
        products = tl.dot(k, tl.trans(q), input_precision="ieee")
        weight_grad = tl.dot(v, tl.trans(g), input_precision="ieee")
        used, logit_grad = _gradients(
            products, weight_grad, row_lse[None, :], row_delta[None, :], query[None, :], key[:, None], head + member,
            key_mask, attn_mask + member64 * stride_mask_h, documents, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, scale, softcap, dropout_p, seed, CAUSAL, MASKS, SOFTCAP, DROPOUT, ON_EDGE,
        )  # fmt: skip
        grad_v += tl.dot(used.to(g.dtype), g, input_precision="ieee")
        grad_k += tl.dot(logit_grad.to(q.dtype), q, input_precision="ieee")
        visited = following
    return grad_k, grad_v


@triton.jit(do_not_specialize=["q_len", "kv_len", "seed"])
def dkdv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, start, full, index, order, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, tiles, q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SHARED: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Writes grad_k and grad_v, contiguous, (batch, heads, kv_len, head_dim): of each query head, or of each key head.

    The latter is done with `SHARED`: a program visits the queries of a whole KV group, and an entry of its index holds
    the tile and which head of the group it belongs to.
    """
    program = tl.load(order + tl.program_id(0))
    sample = tl.program_id(1).to(tl.int64)
    members = group if SHARED else 1
    part, tile = program // tiles, program % tiles
    head = part * members
    kv_head = (head // group).to(tl.int64)
    flat_head = sample * heads + head
    first, in_tile, dims = tile * TILE_K, tl.arange(0, TILE_K), tl.arange(0, HEAD)
    key = first + in_tile
    k_tile = load_tile(k + sample * stride_kb + kv_head * stride_kh, first, in_tile, kv_len, dims, head_dim,
                       stride_kt, stride_kd, PADDED, True)  # fmt: skip
    v_tile = load_tile(v + sample * stride_vb + kv_head * stride_vh, first, in_tile, kv_len, dims, head_dim,
                       stride_vt, stride_vd, PADDED, True)  # fmt: skip
    q_base = q + sample * stride_qb + head.to(tl.int64) * stride_qh
    g_base = grad_out + sample * stride_gb + head.to(tl.int64) * stride_gh
    lse += flat_head * q_len
    delta += flat_head * q_len
    mask_base = attn_mask + sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    documents += sample * kv_len
    begin, end = tl.load(start + program), tl.load(start + program + 1)
    middle = begin + tl.load(full + program)
    dk = tl.zeros([TILE_K, HEAD], tl.float32)
    dv = tl.zeros([TILE_K, HEAD], tl.float32)
    for edge in tl.static_range(2):
        dk, dv = _visit_queries(
            dk, dv, k_tile, v_tile, middle if edge else begin, end if edge else middle, index, q_base, g_base, lse,
            delta, key, dims, flat_head.to(tl.int32), key_mask, mask_base, documents,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_mask_h, stride_mask_q,
            stride_mask_k, window, q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
            TILE_Q, SHARED, CAUSAL, MASKS, SOFTCAP, DROPOUT, PADDED, edge == 1,
        )  # fmt: skip
    base = ((sample * (heads // members) + part) * kv_len + first) * head_dim
    place = in_tile[:, None] * head_dim + dims[None, :]
    inside = (in_tile < kv_len - first)[:, None] & (dims < head_dim)[None, :]
    tl.store(grad_v + base + place, dv.to(grad_v.dtype.element_ty), mask=inside)
    tl.store(grad_k + base + place, (dk * scale).to(grad_k.dtype.element_ty), mask=inside)
