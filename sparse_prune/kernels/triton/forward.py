"""The forward kernel: one program per (head, query tile), over the key tiles it keeps."""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_prune.kernels.triton.tiles import dropout_factor, load_tile, scaled, visible


@triton.jit
def _tiles(index, visit, end, SPAN: tl.constexpr):
    """Return the key tiles of a turn, which need not be neighbours; the same one twice if there is only one."""
    tile = tl.load(index + visit)
    other = tile
    if SPAN == 2:
        other = tl.load(index + tl.minimum(visit + 1, end))
    return tile, other


@triton.jit
def _visit(
    acc, top, total, q, begin, end, index, k_base, v_base, query, dims, head, key_mask, attn_mask, documents,
    stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
    q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_K: tl.constexpr, SPAN: tl.constexpr, CAUSAL: tl.constexpr, MASKS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over visits begin..end, `SPAN` a turn, 1 or 2."""
    in_tile = tl.arange(0, SPAN * TILE_K)
    block, other = _tiles(index, begin, end, SPAN)
    for visit in tl.range(begin, end, SPAN):
        # The next index is loaded a turn ahead: loaded in this turn it would cost the pipeline a stage.
        following, following_other = _tiles(index, visit + SPAN, end, SPAN)
        if SPAN == 2:
            key = in_tile + tl.where(in_tile < TILE_K, block * TILE_K, (other - 1) * TILE_K)
            first = (key - in_tile)[:, None]
        else:
            first = block * TILE_K
            key = first + in_tile
        k = load_tile(k_base, first, in_tile, kv_len, dims, head_dim, stride_kt, stride_kd, PADDED, ON_EDGE)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits, _ = scaled(products, scale, softcap, SOFTCAP)
        if ON_EDGE or MASKS:
            seen = visible(
                query[:, None], key[None, :], q_len, kv_len, key_mask, attn_mask, documents, stride_mask_q,
                stride_mask_k, window,
                CAUSAL, MASKS, ON_EDGE,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        if ON_EDGE or MASKS or SOFTCAP:
            largest = tl.max(logits, 1)
        else:
            # The scale is not negative: the largest product is scaled in place of all, and the compiler subtracts it
            # in the multiplication of the others.
            largest, _ = scaled(tl.max(products, 1), scale, softcap, SOFTCAP)
        higher = tl.maximum(top, largest)
        # A row that has seen no key yet has the maximum -inf; with a finite one its weights become 0, not NaN.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            weights = weights * dropout_factor(seed, head, query[:, None], key[None, :], dropout_p)
        v = load_tile(v_base, first, in_tile, kv_len, dims, head_dim, stride_vt, stride_vd, PADDED, ON_EDGE)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
        block, other = following, following_other
    return acc, top, total


@triton.jit(do_not_specialize=["q_len", "kv_len", "seed"])
def forward_kernel(
    q, k, v, out, lse, start, full, index, order, key_mask, attn_mask, documents,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_pb, stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, window,
    heads, group, tiles, q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SPAN: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    MASKS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Writes out (batch, heads, q_len, head_dim) and lse, base 2, (batch, heads, q_len); +inf for empty rows."""
    program = tl.load(order + tl.program_id(0))
    sample = tl.program_id(1).to(tl.int64)
    head, tile = program // tiles, program % tiles
    kv_head = (head // group).to(tl.int64)
    first, in_tile, dims = tile * TILE_Q, tl.arange(0, TILE_Q), tl.arange(0, HEAD)
    query = first + in_tile
    q_tile = load_tile(q + sample * stride_qb + head.to(tl.int64) * stride_qh, first, in_tile, q_len, dims, head_dim,
                       stride_qt, stride_qd, PADDED, True)  # fmt: skip
    k_base, v_base = k + sample * stride_kb + kv_head * stride_kh, v + sample * stride_vb + kv_head * stride_vh
    mask_base = attn_mask + sample * stride_mask_b + head.to(tl.int64) * stride_mask_h
    key_mask += sample * stride_pb
    documents += sample * kv_len
    flat_head = (sample * heads + head).to(tl.int32)
    begin, end = tl.load(start + program), tl.load(start + program + 1)
    middle = begin + tl.load(full + program) // SPAN * SPAN  # an odd one goes with those on the edge
    acc = tl.zeros([TILE_Q, HEAD], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    for edge in tl.static_range(2):
        acc, top, total = _visit(
            acc, top, total, q_tile, middle if edge else begin, end if edge else middle, index, k_base, v_base, query,
            dims, flat_head, key_mask, mask_base, documents,
            stride_kt, stride_kd, stride_vt, stride_vd, stride_mask_q, stride_mask_k, window,
            q_len, kv_len, head_dim, scale, softcap, dropout_p, seed,
            TILE_K, 1 if edge else SPAN, CAUSAL, MASKS, SOFTCAP, DROPOUT, PADDED, edge == 1,
        )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    inside = (query < q_len)[:, None]
    if PADDED:
        inside = inside & (dims < head_dim)[None, :]
    out_base = out + sample * stride_ob + head.to(tl.int64) * stride_oh
    place = query.to(tl.int64)[:, None] * stride_ot + dims[None, :] * stride_od
    tl.store(out_base + place, acc.to(out.dtype.element_ty), mask=inside)
    row_lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + (sample * heads + head) * q_len + query, row_lse, mask=query < q_len)
