"""FlexAttention with the pattern as its block mask: what a user would pick instead, and an oracle for our kernels."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Shapes as in `reference.attend`. Compiled and skipping pruned blocks on a GPU; on a CPU plain torch operations.

    Raises:
        ValueError: If dropout is asked for, which FlexAttention has not, or gradients on a CPU.
    """
    if options.dropout_p:
        raise ValueError(
            f"Backend 'flex' has no dropout, got `dropout_p` {options.dropout_p}. Use 'triton' or 'gather'."
        )
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if query.device.type == "cpu":
        if wants_grad:
            raise ValueError("Backend 'flex' has no gradients on a CPU. Use 'gather', or torch.no_grad().")
        query, key, value = query.detach(), key.detach(), value.detach()  # it looks at the flag alone
    softcap = options.softcap

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attention = _compiled() if query.device.type == "cuda" else flex_attention
    output: Tensor = attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else score_mod,
        block_mask=_block_mask(pattern, options, query.device),
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


_PLAIN: WeakKeyDictionary[BlockPattern, dict[torch.device, BlockMask]] = WeakKeyDictionary()


def _block_mask(pattern: BlockPattern, options: AttentionOptions, device: torch.device) -> BlockMask:
    """Built once per pattern, unless masks come with the call."""
    visible = options.token_mask(pattern.q_len, pattern.kv_len, device)
    if visible is not None:
        return _build(pattern, visible.expand(-1, -1, pattern.q_len, pattern.kv_len), device)
    known = _PLAIN.setdefault(pattern, {})
    if device not in known:
        known[device] = _build(pattern, None, device)
    return known[device]


def _build(pattern: BlockPattern, visible: Tensor | None, device: torch.device) -> BlockMask:
    block_q, block_kv = pattern.block_size
    q_len, kv_len = pattern.q_len, pattern.kv_len
    keep, offset = pattern.keep.to(device), kv_len - q_len

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = keep[h, q.clamp(max=q_len - 1) // block_q, k.clamp(max=kv_len - 1) // block_kv]
        if pattern.causal:
            seen = seen & (k <= q + offset)
        if visible is not None:
            batch, heads = visible.shape[0] > 1, visible.shape[1] > 1
            seen = seen & visible[b if batch else b * 0, h if heads else h * 0, q, k]
        return seen

    whole = torch.zeros_like(keep) if visible is not None else keep & _whole(pattern).to(device)
    return BlockMask.from_kv_blocks(
        *_listed(keep & ~whole),
        *_listed(whole),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )


def _whole(pattern: BlockPattern) -> Tensor:
    """Blocks without an element mask, boolean, (q_blocks, kv_blocks)."""
    block_q, block_kv = pattern.block_size
    rows, cols = pattern.keep.shape[1:]
    last_key = (torch.arange(cols) + 1) * block_kv - 1
    first_seen = torch.arange(rows)[:, None] * block_q + pattern.kv_len - pattern.q_len
    whole = (last_key < pattern.kv_len).expand(rows, cols)
    return whole & (last_key <= first_seen) if pattern.causal else whole


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, heads, rows) counts and (1, heads, rows, cols) indices, the listed blocks first."""
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices.int()
    return blocks.sum(-1, dtype=torch.int32)[None], order[None]
