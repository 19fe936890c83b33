"""Patterns whose heads are full or see sinks and a window, which other programs can express."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparse_prune.attention import PrunableAttention, attach
from sparse_prune.pattern import BlockPattern, num_blocks


@dataclass(frozen=True)
class Reach:
    """The tokens that a streaming head sees."""

    sink: int
    """First tokens of the sequence."""
    recent: int
    """Tokens of the window, in whole blocks, the query's own included."""


@dataclass(frozen=True)
class StreamingHeads:
    """Says which KV heads of a model see everything, and what all others, the streaming heads, see."""

    full: tuple[tuple[bool, ...], ...]
    """Layer by layer, KV head by KV head, True = sees everything."""
    reach: Reach
    """Sinks and window of the streaming heads."""

    @classmethod
    def of(cls, model: nn.Module) -> StreamingHeads:
        """Read them from the patterns of a model; layers without one are full.

        Raises:
            ValueError: If a head is neither full nor sinks and a window, if the query heads of a KV head differ, or if
                two heads see different sinks or windows. The message names layer and head.
        """
        reach: Reach | None = None
        full = []
        for layer in attach(model):
            row = []
            for head, found in enumerate(_kv_reaches(layer)):
                reach = reach or found
                if found is not None and found != reach:
                    raise ValueError(
                        f"All heads that are not full must see the same sinks and window, got {found} in layer "
                        f"{layer.name!r}, KV head {head}, and {reach} before it. {_REMEDY}"
                    )
                row.append(found is None)
            full.append(tuple(row))
        if reach is None:
            raise ValueError(f"`model` must have a head that is not full, got none. {_REMEDY}")
        return cls(tuple(full), reach)

    def patterns(self, model: nn.Module, length: int, block_size: int) -> dict[str, BlockPattern]:
        """Make patterns of these heads for a model; see `Format.read`.

        Raises:
            ValueError: If the model has other layers or KV heads.
        """
        layers = attach(model)
        here, there = [layer.num_kv_heads for layer in layers], [len(row) for row in self.full]
        if here != there:
            raise ValueError(
                f"`model` must have the KV heads of the file, {there} by layer, got {here}. Give the model of the file."
            )
        sinks, recent = num_blocks(self.reach.sink, block_size), num_blocks(self.reach.recent, block_size)
        return {
            layer.name: _pattern(row, layer.num_heads, sinks, recent, length, block_size)
            for layer, row in zip(layers, self.full, strict=True)
            if not all(row)
        }


_REMEDY = 'Prune with Constraints(far_field="head", share_kv_groups=True).'


def reaches(pattern: BlockPattern, layer: str) -> list[Reach | None]:
    """Return what every query head of a causal pattern of self-attention in square blocks sees; None if it is full.

    Raises:
        ValueError: If a head is neither full nor sinks and a window; the message names it and the `layer`.
    """
    side, other = pattern.block_size
    if not pattern.causal or pattern.q_len != pattern.kv_len or side != other:
        raise ValueError(
            f"Layer {layer!r} must have a causal pattern of self-attention in square blocks, got causal="
            f"{pattern.causal}, lengths ({pattern.q_len}, {pattern.kv_len}), blocks {pattern.block_size}. "
            "Export the model with `save_pretrained`."
        )
    found: list[Reach | None] = []
    for head, keep in enumerate(pattern.keep):
        if bool((keep | ~pattern.possible).all()):
            found.append(None)
            continue
        sinks = int(keep[-1].long().cumprod(0).sum())
        recent = int(keep[-1].flip(0).long().cumprod(0).sum())
        if not torch.equal(keep, _streaming(len(keep), sinks, recent)):
            raise ValueError(
                f"Layer {layer!r}, head {head} must see everything, or sinks and a window, got other blocks. {_REMEDY}"
            )
        found.append(Reach(sinks * side, recent * side))
    return found


def _kv_reaches(layer: PrunableAttention) -> list[Reach | None]:
    if layer.pattern is None or layer.mode == "dense":
        return [None] * layer.num_kv_heads
    heads, group = reaches(layer.pattern, layer.name), layer.num_heads // layer.num_kv_heads
    for head, found in enumerate(heads):
        if found != heads[head // group * group]:
            raise ValueError(
                f"The query heads of a KV head must see the same, got another reach in layer {layer.name!r}, head "
                f"{head}, than in head {head // group * group}. {_REMEDY}"
            )
    return heads[::group]


def _streaming(rows: int, sinks: int, recent: int) -> torch.Tensor:
    """Mark the blocks that sinks and a window keep, boolean, (rows, rows)."""
    row, col = torch.arange(rows)[:, None], torch.arange(rows)
    return (col <= row) & ((col < sinks) | (row - col < recent))


def _pattern(
    full: Sequence[bool], num_heads: int, sinks: int, recent: int, length: int, block_size: int
) -> BlockPattern:
    rows = num_blocks(length, block_size)
    streaming = torch.tensor(full).logical_not().repeat_interleave(num_heads // len(full))
    keep = _streaming(rows, sinks, recent) | ~streaming[:, None, None]
    return BlockPattern(keep, (block_size, block_size), True, length, length)
