"""FlexAttention with the pattern as its block mask: an alternative to our kernels, and an oracle for them."""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_prune.kernels.derived import derived
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern, whole_blocks

_COMPILERS = {"cuda": "inductor", "cpu": "eager"}
_KINDS_KEPT = 64
_LONGEST_TILE = 128  # of torch's default launch configurations; a tile must divide a block


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute as `reference.attend`, compiled and skipping pruned blocks on a GPU, in plain torch on a CPU.

    Raises:
        ValueError: If dropout is asked for, or gradients on a CPU, which FlexAttention does not support.
    """
    if options.dropout_p:
        raise ValueError(
            f"Backend 'flex' has no dropout, got `dropout_p` {options.dropout_p}. Use 'triton' or 'gather'."
        )
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    device = query.device
    if device.type == "cpu":
        if wants_grad:
            raise ValueError("Backend 'flex' has no gradients on a CPU. Use 'gather', or torch.no_grad().")
        query, key, value = query.detach(), key.detach(), value.detach()  # it refuses `requires_grad` alone
    visible = options.token_mask(pattern.q_len, pattern.kv_len, device)
    masked = None if visible is None else visible.shape
    shapes = (query.shape, key.shape, value.shape, query.dtype, device, masked)
    tiles = _tiles(pattern.block_size) if device.type == "cuda" else None
    compiled = _compiled(
        _COMPILERS[device.type],
        tiles is not None and wants_grad,
        (*shapes, pattern.block_size, pattern.causal, options.scale, options.softcap, wants_grad),
    )
    output: Tensor = compiled(
        query, key, value, options.softcap, _block_mask(pattern, visible, device), options.scale, tiles
    )
    return output


def _tiles(block_size: tuple[int, int]) -> dict[str, Any] | None:
    """Choose kernel options whose tiles divide the blocks in the forward pass; None if the default ones do.

    Raises:
        ValueError: If a side is not a multiple of 16, the least side of a tile.
    """
    if all(side % _LONGEST_TILE == 0 for side in block_size):
        return None
    rows, cols = (min(side & -side, _LONGEST_TILE) for side in block_size)
    if min(rows, cols) < 16:
        raise ValueError(f"Backend 'flex' needs blocks with a factor of 16 on a GPU, got {block_size}. Use 'triton'.")
    # The decoding kernel, used for few queries, would choose its own tiles.
    return {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": cols, "fwd_num_warps": 4, "FORCE_USE_FLEX_ATTENTION": True}


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float | None,
    block_mask: BlockMask,
    scale: float | None,
    kernel_options: Any,
) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=kernel_options,
    )


@lru_cache(_KINDS_KEPT)
def _compiled(compiler: str, tuned: bool, kind: tuple[Any, ...]) -> Any:
    """Compile `_call` for one kind of call, with a code object of its own.

    torch.compile counts recompilations per code object: with a common one, calls of the ninth kind would run
    uncompiled, with all scores materialised. With `fullgraph` it fails instead. `tuned` lets Inductor choose among its
    launch configurations: in the backward pass its default works only if that one's tiles divide the blocks, whatever
    `kernel_options` say.
    """
    function = FunctionType(_call.__code__.replace(), _call.__globals__)
    return torch.compile(
        function,
        dynamic=False,
        fullgraph=True,
        backend=compiler,
        options={"max_autotune": True} if tuned else None,
    )


def _block_mask(pattern: BlockPattern, visible: Tensor | None, device: torch.device) -> BlockMask:
    """Return the block mask, built once per pattern unless the call has masks."""
    if visible is not None:
        return _build(pattern, visible.expand(-1, -1, pattern.q_len, pattern.kv_len), device)
    return derived(pattern, ("flex", device), lambda: _build(pattern, None, device))


def _build(pattern: BlockPattern, visible: Tensor | None, device: torch.device) -> BlockMask:
    # The mask is kept with the pattern, so `mask_mod` must not refer to the pattern.
    (block_q, block_kv), causal = pattern.block_size, pattern.causal
    q_len, kv_len = pattern.q_len, pattern.kv_len
    keep, offset = pattern.keep.to(device, copy=True), kv_len - q_len

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = keep[h, q.clamp(max=q_len - 1) // block_q, k.clamp(max=kv_len - 1) // block_kv]
        if causal:
            seen = seen & (k <= q + offset)
        if visible is not None:
            batch, heads = visible.shape[0] > 1, visible.shape[1] > 1
            seen = seen & visible[b if batch else b * 0, h if heads else h * 0, q, k]
        return seen

    whole = (
        torch.zeros_like(keep)
        if visible is not None
        else keep & whole_blocks(q_len, kv_len, pattern.block_size, causal, device)
    )
    return BlockMask.from_kv_blocks(
        *_listed(keep & ~whole),
        *_listed(whole),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts, (1, heads, rows), and indices, (1, heads, rows, cols), the listed blocks first."""
    order = blocks.int().sort(dim=-1, descending=True, stable=True).indices.int()
    return blocks.sum(-1, dtype=torch.int32)[None], order[None]
