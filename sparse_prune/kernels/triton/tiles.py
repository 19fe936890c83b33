"""Functions that the kernels share: loading a tile, its logits, every mask, and dropout."""

from __future__ import annotations

import triton
import triton.language as tl

# Logits are kept in base 2, because the hardware computes exp2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    base, first, rows, length, dims, head_dim, stride_token, stride_dim, PADDED: tl.constexpr, ON_EDGE: tl.constexpr,
):  # fmt: skip
    """Load rows `first + rows` and dimensions `dims` of a (length, head_dim) matrix.

    With `ON_EDGE` rows past the end are 0; without it, all rows must exist. With `PADDED` dimensions past `head_dim`
    are 0. The offsets within a tile are the same for every tile, so that a loop computes them once and adds one number
    of 64 bits a turn. A tile must not span 2^31 elements.
    """
    pointers = (
        base + tl.cast(first, tl.int64) * stride_token + (rows[:, None] * stride_token + dims[None, :] * stride_dim)
    )
    if ON_EDGE:
        inside = (first + rows < length)[:, None]
        if PADDED:
            inside = inside & (dims < head_dim)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    if PADDED:
        return tl.load(pointers, mask=(dims < head_dim)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def cap(logits, softcap):
    """Return softcap * tanh(logits / softcap), and its slope."""
    bounded = 2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0
    return bounded * softcap, 1.0 - bounded * bounded


@triton.jit
def scaled(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Return the logits of query-key products, in units of log2, and the slope of the soft cap.

    Without a cap, scale and log2(e) are multiplied into one factor here, which the compiler does not do.
    """
    slope = 1.0
    if SOFTCAP:
        logits, slope = cap(products * scale, softcap)
        logits = logits * LOG2E
    else:
        logits = products * (scale * LOG2E)
    return logits, slope


@triton.jit
def visible(
    query,
    key,
    q_len,
    kv_len,
    key_mask,
    attn_mask,
    documents,
    stride_mask_q,
    stride_mask_k,
    window,
    CAUSAL: tl.constexpr,
    MASKS: tl.constexpr,
    ON_EDGE: tl.constexpr,
):
    """Whether queries may see keys, elementwise. `query` and `key` are positions, broadcast against each other.

    `MASKS` adds up what is given: 1 key mask, 2 attention mask, 4 documents, 8 window. Without `ON_EDGE` all positions
    must exist, and causality must hide none of the keys.
    """
    inside = (query >= 0) & (key >= 0)
    if ON_EDGE:
        inside = inside & (key < kv_len)
        if CAUSAL:
            inside = inside & (key <= query + (kv_len - q_len))
    if MASKS & 1:
        inside = inside & (tl.load(key_mask + key, mask=key < kv_len, other=0) != 0)
    if MASKS & 2:
        place = query.to(tl.int64) * stride_mask_q + key.to(tl.int64) * stride_mask_k
        # Without the comparison, which only the edge needs, a row is read in words, not in bytes.
        readable = query < q_len
        if ON_EDGE:
            readable = readable & (key < kv_len)
        inside = inside & (tl.load(attn_mask + place, mask=readable, other=0) != 0)
    if MASKS & 4:
        position = query + (kv_len - q_len)
        mine = tl.load(documents + position, mask=(position >= 0) & (query < q_len), other=-1)
        inside = inside & (mine == tl.load(documents + key, mask=key < kv_len, other=-2))
    if MASKS & 8:
        inside = inside & (key > query + (kv_len - q_len) - window)
    return inside


@triton.jit
def unpadded(query, key_mask, q_len, kv_len, MASKS: tl.constexpr):
    """Return positions of queries, padding moved past the end, where it sees nothing.

    The key mask tells of queries only where they are the keys, as in self-attention over one length.
    """
    if MASKS & 1:
        padding = (q_len == kv_len) & (tl.load(key_mask + query, mask=query < q_len, other=1) == 0)
        query = tl.where(padding, q_len, query)
    return query


@triton.jit
def dropout_factor(seed, head, query, key, dropout_p):
    """Return 0 for dropped weights, 1 / (1 - p) for the others; the same numbers as `kernels.dropout`."""
    key, query = tl.broadcast(key, query)
    head = tl.zeros_like(key) + head
    bits, _, _, _ = tl.philox(seed, key, query, head, tl.zeros_like(key))
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
