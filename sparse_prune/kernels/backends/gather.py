"""The gather backend: computes each query block's kept blocks as dense batched products; pruned blocks cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.derived import derived
from sparse_prune.kernels.dropout import dropout_uniform
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

_CHUNK = 2**20
"""Attention weights computed at a time: few enough to stay in cache, enough to fill batched products."""


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute as `reference.attend`, with time and memory in proportion to the kept blocks, forward and backward.

    On the CPU equal inputs give equal bits, also of gradients. Gradients of gradients are refused.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    function: Any = _GatheredAttention  # torch leaves `apply` untyped
    output: Tensor = function.apply(query, key, value, pattern, options)
    return output


@dataclass(frozen=True)
class _TileSet:
    """The (head, query block) tiles that keep equally many blocks under the same element mask."""

    head: Tensor
    """(tiles,)"""
    row: Tensor
    """Query block, (tiles,)."""
    cols: Tensor
    """Kept key blocks, (tiles, blocks); those that need an element mask come last."""
    hidden: Tensor | None
    """Boolean, (block_q, tokens), True = hidden, for the last `tokens` keys of each tile. None: all are visible."""


def _build_tile_sets(pattern: BlockPattern, device: torch.device) -> list[_TileSet]:
    block_q, block_kv = pattern.block_size
    heads, rows, cols = pattern.keep.shape
    # A block's element mask follows from two numbers: the last key that its first query sees, and its real keys.
    first_key = torch.arange(cols) * block_kv
    real = (pattern.kv_len - first_key).clamp(max=block_kv).expand(rows, cols)
    last = torch.full((rows, cols), block_kv - 1)
    if pattern.causal:
        offset = pattern.kv_len - pattern.q_len
        last = (torch.arange(rows)[:, None] * block_q + offset - first_key).clamp(-block_q, block_kv - 1)
    # The code is 0 for blocks without a mask and decodes to (last, real) for the others.
    base = block_q + block_kv
    code = (block_kv - 1 - last) + base * (block_kv - real)
    code = torch.where(pattern.keep, code, base * block_kv).view(heads * rows, cols)
    code, order = code.sort(dim=-1, stable=True)
    kinds, kind_of = torch.unique(code, dim=0, return_inverse=True)
    query, key = torch.arange(block_q)[:, None], torch.arange(block_kv)
    tile_sets = []
    for index, kind in enumerate(kinds):
        kept = kind[kind < base * block_kv].tolist()
        if not kept:
            continue
        masks = [(key > query + block_kv - 1 - c % base) | (key >= block_kv - c // base) for c in kept if c]
        tile = (kind_of == index).nonzero()[:, 0]
        tile_sets.append(
            _TileSet(
                (tile // rows).to(device),
                (tile % rows).to(device),
                order[tile, : len(kept)].to(device),
                torch.cat(masks, -1).to(device) if masks else None,
            )
        )
    return tile_sets


@dataclass(frozen=True)
class _Chunk:
    """Tiles of one set and of any samples that are computed together."""

    head: Tensor
    """batch * num_heads + head, (tiles,)."""
    query: Tensor
    """Query positions, (tiles, block_q)."""
    key: Tensor
    """Key positions, (tiles, keys)."""
    q_index: Tensor
    """Query blocks among those of all samples and heads, (tiles,)."""
    kv_index: Tensor
    """Key blocks among those of all samples and key heads, (tiles * blocks,)."""
    hidden: Tensor | None
    """As in `_TileSet`."""


@dataclass(frozen=True)
class _Call:
    """One attention call as batched products over chunks."""

    pattern: BlockPattern
    options: AttentionOptions
    batch: int
    kv_heads: int
    scale: float
    device: torch.device

    def chunks(self) -> Iterator[_Chunk]:
        heads, rows, cols = self.pattern.keep.shape
        block_q, block_kv = self.pattern.block_size
        in_q, in_kv = torch.arange(block_q, device=self.device), torch.arange(block_kv, device=self.device)
        tile_sets = derived(self.pattern, ("gather", self.device), lambda: _build_tile_sets(self.pattern, self.device))
        for tile_set in tile_sets:
            tiles, blocks = tile_set.cols.shape
            count, size = self.batch * tiles, max(1, _CHUNK // (block_q * block_kv * blocks))
            for start in range(0, count, size):
                part = torch.arange(start, min(start + size, count), device=self.device)
                sample, tile = part // tiles, part % tiles
                head, row, col = tile_set.head[tile], tile_set.row[tile], tile_set.cols[tile]
                kv_head = sample * self.kv_heads + head // (heads // self.kv_heads)
                head = sample * heads + head
                yield _Chunk(
                    head,
                    row[:, None] * block_q + in_q,
                    (col[:, :, None] * block_kv + in_kv).flatten(1),
                    head * rows + row,
                    (kv_head[:, None] * cols + col).flatten(),
                    tile_set.hidden,
                )

    def in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut query, key and value into blocks, in the dtypes of their products."""
        (block_q, block_kv), (exact, fast) = self.pattern.block_size, _dtypes(query.dtype)
        q, k = _to_blocks(query.to(exact), block_q), _to_blocks(key.to(exact), block_kv)
        return q, k, _to_blocks(value.to(fast), block_kv)

    def logits(self, chunk: _Chunk, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute masked logits, (tiles, block_q, keys), and with a soft cap its slope at them."""
        logits, slope = torch.bmm(query * self.scale, key.transpose(1, 2)), None
        if self.options.softcap is not None:
            bounded = torch.tanh(logits / self.options.softcap)
            logits, slope = bounded * self.options.softcap, 1.0 - bounded.square()
        if chunk.hidden is not None:
            logits[..., -chunk.hidden.shape[1] :].masked_fill_(chunk.hidden, -torch.inf)
        # Positions past the ends are padding: they are hidden above (keys) or cut off later (queries).
        at_key = chunk.key.clamp(max=self.pattern.kv_len - 1)
        sample = chunk.head // self.pattern.num_heads
        if self.options.key_mask is not None:
            logits.masked_fill_(~self.options.key_mask[sample[:, None], at_key][:, None], -torch.inf)
        if self.options.attn_mask is not None:
            heads, q_len, kv_len = self.pattern.num_heads, self.pattern.q_len, self.pattern.kv_len
            mask = self.options.attn_mask.expand(self.batch, heads, q_len, kv_len)
            at_query = chunk.query.clamp(max=q_len - 1)[:, :, None]
            mask = mask[sample[:, None, None], (chunk.head % heads)[:, None, None], at_query, at_key[:, None]]
            logits.masked_fill_(~mask, -torch.inf)
        # The queries are the last ones of all positions.
        position = chunk.query.clamp(max=self.pattern.q_len - 1) + (self.pattern.kv_len - self.pattern.q_len)
        if self.options.documents is not None:
            documents, sample = self.options.documents, sample[:, None]
            other = documents[sample, position][:, :, None] != documents[sample, at_key][:, None]
            logits.masked_fill_(other, -torch.inf)
        if self.options.window is not None:
            logits.masked_fill_(at_key[:, None] <= position[:, :, None] - self.options.window, -torch.inf)
        return logits, slope

    def dropout(self, chunk: _Chunk, dtype: torch.dtype) -> Tensor | None:
        """Draw factors on the weights, (tiles, block_q, keys): 0 for dropped ones."""
        if not self.options.dropout_p:
            return None
        assert self.options.seed is not None
        uniform = dropout_uniform(
            self.options.seed, chunk.head[:, None, None], chunk.query[:, :, None], chunk.key[:, None]
        )
        return (uniform >= self.options.dropout_p).to(dtype) / (1.0 - self.options.dropout_p)


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """Cut (batch, heads, length, dim) into (batch * heads * blocks, block, dim), with zeros after a ragged end."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.reshape(-1, block, x.shape[3])


def _from_blocks(x: Tensor, like: Tensor) -> Tensor:
    """Undo `_to_blocks`, giving the dtype and all but the last size of `like`."""
    return x.view(like.shape[0], like.shape[1], -1, x.shape[2])[:, :, : like.shape[2]].to(like.dtype)


def _pick(x: Tensor, index: Tensor, tiles: int) -> Tensor:
    """Pick blocks by index and join them per tile: (tiles, tokens, dim)."""
    return x.index_select(0, index).view(tiles, -1, x.shape[2])


def _dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtype of logits and sums, and that of the other products."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Not float16: sums of weights times values may leave its range.
    return exact, dtype if dtype == torch.bfloat16 else exact


class _GatheredAttention(torch.autograd.Function):
    """Keeps the inputs, the output and the log-sum-exp of each row; the backward pass recomputes the weights.

    It can be differentiated once: the backward pass treats the log-sum-exp as a constant.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions
    ) -> Tensor:
        batch, _, _, head_dim = query.shape
        scale = head_dim**-0.5 if options.scale is None else options.scale
        call = _Call(pattern, options, batch, key.shape[1], scale, query.device)
        exact, fast = _dtypes(query.dtype)
        lowest = torch.finfo(exact).min
        q, k, v = call.in_blocks(query, key, value)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=query.dtype)
        lse = q.new_zeros(*q.shape[:2], 1)
        with torch.autocast(query.device.type, enabled=False):
            for chunk in call.chunks():
                tiles = len(chunk.q_index)
                logits, _ = call.logits(chunk, _pick(q, chunk.q_index, tiles), _pick(k, chunk.kv_index, tiles))
                # Rows without a key have the maximum -inf; with a finite one their weights become 0, not NaN.
                top = logits.amax(-1, keepdim=True).clamp_(min=lowest)
                weights = logits.sub_(top).exp_()
                # At least 1, the weight of the maximum, wherever there is a key.
                total = weights.sum(-1, keepdim=True).clamp_(min=1.0)
                lse[chunk.q_index] = top + total.log()
                factor = call.dropout(chunk, exact)
                if factor is not None:
                    weights.mul_(factor)
                part = torch.bmm(weights.to(fast), _pick(v, chunk.kv_index, tiles))
                out[chunk.q_index] = (part / total).to(out.dtype)
        output = _from_blocks(out, query)
        ctx.call = call
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        call: _Call = ctx.call
        query, key, value, output, lse = ctx.saved_tensors
        block_q, (exact, fast) = call.pattern.block_size[0], _dtypes(query.dtype)
        q, k, v = call.in_blocks(query, key, value)
        g = _to_blocks(grad.to(fast), block_q)
        # The softmax subtracts this from every logit's gradient: sum over keys of weight * gradient of the weight.
        shift = _to_blocks((grad.to(exact) * output).sum(-1, keepdim=True), block_q)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v, dtype=exact)
        with torch.autocast(query.device.type, enabled=False):
            for chunk in call.chunks():
                tiles, at_q, at_kv = len(chunk.q_index), chunk.q_index, chunk.kv_index
                q_part, k_part, g_part = _pick(q, at_q, tiles), _pick(k, at_kv, tiles), _pick(g, at_q, tiles)
                logits, slope = call.logits(chunk, q_part, k_part)
                weights = logits.sub_(_pick(lse, at_q, tiles)).exp_()
                factor = call.dropout(chunk, exact)
                dropped = weights if factor is None else weights * factor
                part = torch.bmm(dropped.to(fast).transpose(1, 2), g_part)
                grad_v.index_add_(0, at_kv, part.to(exact).view(-1, *v.shape[1:]))
                grad_weights = torch.bmm(g_part, _pick(v, at_kv, tiles).transpose(1, 2)).to(exact)
                if factor is not None:
                    grad_weights.mul_(factor)
                grad_logits = grad_weights.sub_(_pick(shift, at_q, tiles)).mul_(weights)
                if slope is not None:
                    grad_logits.mul_(slope)
                grad_logits = grad_logits.to(fast)
                grad_q[at_q] = torch.bmm(grad_logits, k_part.to(fast)).to(exact)
                part = torch.bmm(grad_logits.transpose(1, 2), q_part.to(fast))
                grad_k.index_add_(0, at_kv, part.to(exact).view(-1, *k.shape[1:]))
        grads = _from_blocks(grad_q.mul_(call.scale), query), _from_blocks(grad_k.mul_(call.scale), key)
        return *grads, _from_blocks(grad_v, value), None, None


BACKEND = Backend("gather", attend, skips_on=("cpu", "cuda"), rank=30)
