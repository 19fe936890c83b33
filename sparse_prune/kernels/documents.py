"""Packed sequences: several documents in one row, whose tokens do not see each other."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels.derived import of_tensor
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern, num_blocks
from sparse_prune.scores import BlockStatistics

_NEXT_TO_NOTHING = 2.0**-30
"""Weight, per row, of a block that no document has spanned yet: its score is 0 until one does."""


def documents_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Number packed sequences by their cumulative lengths, as FlashAttention's variable-length calls take them.

    Args:
        cu_seqlens: Integers, (sequences + 1,), ascending from 0 to `length`.
        length: Tokens of the packed sample.

    Returns:
        int32, (1, length), for `AttentionOptions.documents`.

    Raises:
        ValueError: If the cumulative lengths do not ascend from 0 to `length`.
    """
    ends = cu_seqlens.long()
    if not torch.compiler.is_compiling() and not _ascends(ends, length):  # a tracer cannot read them
        raise ValueError(f"`cu_seqlens` must ascend from 0 to {length}, got {cu_seqlens.tolist()}.")
    position = torch.arange(length, device=ends.device)
    return torch.searchsorted(ends[1:], position, right=True).to(torch.int32)[None]


def _ascends(ends: Tensor, length: int) -> bool:
    if ends.dim() != 1 or ends.numel() < 2:
        return False
    return bool((ends[0] == 0) & (ends[-1] == length) & (ends.diff() >= 0).all())


def spanned(pattern: BlockPattern, options: AttentionOptions) -> BlockPattern:
    """Remove the blocks between documents from a call's pattern, so that backends skip them.

    Reads the documents, once per tensor. They may have any order; if they ascend, all such blocks are removed.
    """
    documents = options.documents
    if documents is None or not documents.numel():
        return pattern
    left: WeakKeyDictionary[BlockPattern, BlockPattern | None] = of_tensor(documents, "left", WeakKeyDictionary)
    if pattern not in left:
        sides = pattern.block_size, pattern.q_len
        meets = of_tensor(documents, sides, lambda: _meets(pattern, documents))
        left[pattern] = _left(pattern, meets)
    return left[pattern] or pattern


def _left(pattern: BlockPattern, meets: Tensor) -> BlockPattern | None:
    """Return the part of a pattern inside documents; None: all of it."""
    keep = pattern.keep & meets
    return None if torch.equal(keep, pattern.keep) else replace(pattern, keep=keep)


def _meets(pattern: BlockPattern, documents: Tensor) -> Tensor:
    """Mark blocks in which a query and a key may be of one document, in any sample: boolean, (q_blocks, kv_blocks)."""
    block_q, block_kv = pattern.block_size
    first, last = _range(documents[:, pattern.kv_len - pattern.q_len :], block_q)
    first_key, last_key = _range(documents, block_kv)
    return ((first[:, :, None] <= last_key[:, None]) & (last[:, :, None] >= first_key[:, None])).any(0).cpu()


def _range(documents: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Find the lowest and the highest number in each block, (batch, blocks)."""
    missing = -documents.shape[1] % side
    padded = torch.cat([documents, documents[:, -1:].expand(-1, missing)], 1)
    return torch.unflatten(padded, 1, (-1, side)).aminmax(dim=2)


def per_document(
    statistics: BlockStatistics, options: AttentionOptions, block_size: tuple[int, int], causal: bool, *per: str
) -> BlockStatistics:
    """Let every block of a probe's statistics count only the rows whose document reaches into it.

    Otherwise a block for which few documents are long enough would score low, however much attention they give it. The
    statistics are of self-attention under documents that ascend; `per` is the unit of each row of their counts: "row",
    "sample" or "call".
    """
    documents = options.documents
    if documents is None or not documents.numel():
        return statistics
    reached = _rows_that_reach(documents, options.key_mask, block_size, causal)  # (batch, q_blocks, kv_blocks)
    samples = (reached > 0).double()
    counts = {"row": reached.sum(0), "sample": samples.sum(0), "call": samples.amax(0)}
    weights = torch.stack([counts[kind] for kind in per])[:, None]
    least = _NEXT_TO_NOTHING * weights.amax(-1, keepdim=True)
    return BlockStatistics(statistics.sums, torch.maximum(weights, least), statistics.kinds)


def _rows_that_reach(documents: Tensor, real: Tensor | None, block_size: tuple[int, int], causal: bool) -> Tensor:
    """Count query rows of a block whose document has tokens in a key block, float64, (batch, q_blocks, kv_blocks)."""
    (block_q, block_kv), (batch, length), device = block_size, documents.shape, documents.device
    rows, cols = num_blocks(length, block_q), num_blocks(length, block_kv)
    place = torch.arange(length, device=device).expand(batch, -1)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    first, last = torch.where(begins, place, 0).cummax(1).values, place
    if not causal:
        ends = F.pad(begins[:, 1:], (0, 1), value=True)
        last = torch.where(ends, place, length).flip(1).cummin(1).values.flip(1)
    # Plus one where a row's keys begin, minus one after their end; the sum along a row of blocks is the count.
    steps = torch.zeros(batch, rows, cols + 1, dtype=torch.float64, device=device)
    one = torch.ones_like(place, dtype=torch.float64) if real is None else real.double()
    line = place // block_q * (cols + 1)
    steps.flatten(1).scatter_add_(1, line + first // block_kv, one)
    steps.flatten(1).scatter_add_(1, line + last // block_kv + 1, -one)
    return steps.cumsum(-1)[..., :cols]
