"""One attention layer as pruning sees it: its mode, its pattern, and what a probe collected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparse_prune.attention.packed import PackedKeys, masked_attention
from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from sparse_prune.pattern import BlockPattern
from sparse_prune.scores import BlockStatistics, probe_blocks

Mode = Literal["dense", "masked", "sparse"]
_LENGTHS_KEPT = 8


class CallShape(NamedTuple):
    """Shape of an attention call, enough to time its like."""

    batch: int
    q_len: int
    kv_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class PrunableAttention:
    """A handle on an attention layer; the layer's module stays in place and keeps its parameters.

    dense: the model's own attention. masked: a pattern that may still move, applied by `masked_backend`. sparse: a
    frozen pattern, applied by `backend`. In every mode a probe may watch training steps.
    """

    name: str
    """Qualified name of the module in the model."""
    num_heads: int
    num_kv_heads: int
    causal: bool
    mode: Mode = "dense"
    backend: str = "sdpa"
    """Backend of the sparse mode."""
    masked_backend: str = "gather"
    """Backend of the masked mode."""
    probe_block_size: tuple[int, int] | None = None
    """Collect statistics with these blocks; None = do not probe."""
    statistics: BlockStatistics | None = None
    """What was collected since `take_statistics`."""
    last_shape: CallShape | None = None
    """The last training call."""
    sliding_window: int | None = None
    """Tokens that a query sees back to, itself included, if the model's own mask has a window."""
    _handed_over: tuple[PackedKeys, Tensor] | None = None
    _pattern: BlockPattern | None = None
    _at: dict[tuple[int, int], BlockPattern] = field(default_factory=dict)

    @property
    def pattern(self) -> BlockPattern | None:
        """The pattern in force; None before the first decision."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: BlockPattern | None) -> None:
        self._pattern = pattern
        self._at = {}

    def pattern_at(self, q_len: int, kv_len: int) -> BlockPattern:
        """The pattern for a call's lengths, kept for the next call; only the latest lengths are."""
        assert self._pattern is not None
        if (q_len, kv_len) not in self._at:
            if len(self._at) == _LENGTHS_KEPT:
                self._at.pop(next(iter(self._at)))
            self._at[q_len, kv_len] = self._pattern.at(q_len, kv_len)
        return self._at[q_len, kv_len]

    def take_statistics(self) -> BlockStatistics | None:
        """What was collected; the handle forgets it."""
        statistics, self.statistics = self.statistics, None
        return statistics

    def hand_over(self, packed: PackedKeys, key: Tensor) -> None:
        """Let the next call, which must come with these new keys, attend to what a cache holds."""
        self._handed_over = packed, key

    def _take_over(self, key: Tensor) -> PackedKeys | None:
        handed, self._handed_over = self._handed_over, None
        if handed is None:
            return None
        packed, new = handed
        if new is not key:
            raise ValueError(
                f"Layer {self.name!r} must attend to the keys that it gave its PatternCache, got others. "
                "If the last call broke off, call again; else use a cache that evicts nothing."
            )
        if packed.pattern is not self._pattern or self.mode == "dense":
            raise ValueError(f"The pattern of layer {self.name!r} changed under its PatternCache. Make a new cache.")
        return packed

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        *,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """Attention in the layer's mode.

        Args:
            query: (batch, num_heads, q_len, head_dim).
            key: (batch, num_kv_heads, kv_len, head_dim).
            value: (batch, num_kv_heads, kv_len, head_dim).
            options: What the model asks for.
            dense: The model's own attention.

        Returns:
            (batch, num_heads, q_len, head_dim).

        Raises:
            ValueError: If the call has another number of heads than the layer.
        """
        if (query.shape[1], key.shape[1]) != (self.num_heads, self.num_kv_heads):
            raise ValueError(
                f"Layer {self.name!r} must be called with {self.num_heads} query and {self.num_kv_heads} key heads, "
                f"got {query.shape[1]} and {key.shape[1]}. Add it to `protected_layers` if it changes its heads."
            )
        packed = self._take_over(key)
        if packed is not None:
            return packed.attend(query, options)
        q_len, kv_len = query.shape[2], key.shape[2]
        # A checkpointed layer runs again inside the backward pass: it was probed and counted the first time.
        first_run = torch._C._current_graph_task_id() == -1  # type: ignore[attr-defined, unused-ignore]
        if first_run and (torch.is_grad_enabled() or self.probe_block_size is not None):
            self.last_shape = CallShape(query.shape[0], q_len, kv_len, query.shape[3], value.dtype, query.device)
            if self.probe_block_size is not None:
                self._probe(query, key, options, self.probe_block_size)
        if self.mode == "dense" or self._pattern is None:
            return dense()
        if q_len != kv_len:
            return self._attend_cached(query, key, value, options)
        backend = self.backend if self.mode == "sparse" else self.masked_backend
        return block_sparse_attention(query, key, value, self.pattern_at(q_len, kv_len), options, backend=backend)

    def _probe(self, query: Tensor, key: Tensor, options: AttentionOptions, block_size: tuple[int, int]) -> None:
        try:
            seen = probe_blocks(
                query.detach(),
                key.detach(),
                block_size,
                causal=self.causal,
                scale=options.scale,
                key_mask=options.key_mask,
                attn_mask=options.attn_mask,
                softcap=options.softcap,
            )
        except ValueError as error:
            raise ValueError(f"Layer {self.name!r}: {error}") from error
        self.statistics = seen if self.statistics is None else self.statistics + seen

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """The last queries against a cache: few rows, so a mask costs little."""
        assert self._pattern is not None
        q_len, kv_len = query.shape[2], key.shape[2]
        if self.sliding_window is not None and kv_len >= self.sliding_window - 1 + q_len:
            raise ValueError(
                f"Layer {self.name!r} has a sliding window of {self.sliding_window} tokens, and its cache may have "
                "dropped keys that the pattern counts. Generate with past_key_values=PatternCache(model)."
            )
        mask = self._pattern.token_mask(q_len, kv_len, query.device)[None]
        if options.key_mask is not None:
            mask = mask & options.key_mask[:, None, None, :]
        if options.attn_mask is not None:
            mask = mask & options.attn_mask
        group = self.num_heads // self.num_kv_heads
        return masked_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, options
        )
