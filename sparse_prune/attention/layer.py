"""The handle on one attention layer: its mode, its pattern, and the statistics of its probes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparse_prune.attention.cached_keys import CachedKeys
from sparse_prune.attention.call_patterns import last_rows, opened
from sparse_prune.attention.chunks import attend_chunk, spans_rows
from sparse_prune.attention.gradient import with_gradient
from sparse_prune.attention.masks import assert_hides_future, hides_future
from sparse_prune.kernels import (
    AttentionOptions,
    block_sparse_attention,
    check_backend,
    moving_backend,
    name_pattern,
    probe_attention,
    probe_score,
)
from sparse_prune.kernels.backend import Decode
from sparse_prune.kernels.backends.sdpa import masked_attention
from sparse_prune.kernels.derived import at_lengths
from sparse_prune.kernels.documents import per_document
from sparse_prune.pattern import BlockPattern
from sparse_prune.scores import STATISTICS, BlockStatistics, Score

log = logging.getLogger(__name__)
Mode = Literal["dense", "masked", "sparse"]


class CallShape(NamedTuple):
    """Shape of an attention call, enough to time similar ones."""

    batch: int
    """Samples."""
    q_len: int
    """Query tokens."""
    kv_len: int
    """Key tokens."""
    head_dim: int
    """Channels of a head."""
    dtype: torch.dtype
    """Dtype of query, key and value."""
    device: torch.device
    """Device of query, key and value."""
    options: AttentionOptions = AttentionOptions()
    """Options of the call; masks are on the meta device, documents as they are."""
    value_dim: int | None = None
    """Channels of a head's values; None: as many as `head_dim`."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of a head's keys, and of its values."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim


@dataclass(eq=False)
class PrunableAttention:
    """A handle on an attention layer; the layer's module stays in place and keeps its parameters.

    dense: the model's own attention. masked: a pattern that may still move, applied by `moving_backend`. sparse: a
    frozen pattern, applied by `backend`. In every mode a probe may watch training steps.
    """

    name: str
    """Qualified name of the module in the model."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads."""
    causal: bool
    """Whether queries see only keys up to themselves."""
    mode: Mode = "dense"
    """How the layer computes: "dense", "masked" or "sparse", as above."""
    backend: str = "sdpa"
    """Backend of the sparse mode."""
    probe_block_size: tuple[int, int] | None = None
    """Tokens per block side of the statistics to collect; None: do not probe."""
    statistics: BlockStatistics | None = None
    """Statistics of row mass since `take_statistics`."""
    mass: bool = True
    """Whether row mass is collected; if not, `score_sums` alone are."""
    score: Score | None = None
    """A score with sums of its own, to be collected beside row mass; None: there is none."""
    score_sums: BlockStatistics | None = None
    """Statistics of `score` since `take_statistics`."""
    gradient_scale: float = 1.0
    """Factor on the loss in the backward pass; it is divided out of the gradients that a score sees."""
    last_shape: CallShape | None = None
    """The last training call."""
    sliding_window: int | None = None
    """Sliding window in tokens, the query's own included, if the model's own mask has one."""
    repeats_keys: bool = False
    """Whether the model's own attention repeats key heads where shared ones would get a slow kernel, as transformers
    does; otherwise it always shares them (`enable_gqa`)."""
    on_load: tuple[partial[None], ...] = ()
    """Called where the handle was copied or loaded, as by `torch.load` in another process."""
    seen: bool = False
    """Whether a call was seen. Until then `causal` is the module's own claim, and the first call decides."""
    aside: str | None = None
    """Why the layer stays dense: its first call was of a kind that cannot be pruned. None: it can be pruned."""
    _pattern: BlockPattern | None = None
    _version: str = ""  # name of the pattern for torch.compile, which recompiles when it changes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.pattern = self._pattern  # which names it in this process
        for call in self.on_load:
            call()

    @property
    def pattern(self) -> BlockPattern | None:
        """The pattern in force; None before the first decision."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: BlockPattern | None) -> None:
        self._pattern = pattern
        if pattern is not None:
            self._version = name_pattern(pattern)

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can follow a call: the pattern is frozen and its kernels are operators of torch."""
        frozen = self.mode == "sparse" and self.probe_block_size is None
        return frozen and check_backend(self.backend).traced is not None

    @property
    def idle(self) -> bool:
        """Whether calls go to the model's own attention: there is no pattern to apply and nothing to probe."""
        untouched = (self.mode == "dense" or self._pattern is None) and self.probe_block_size is None
        return untouched or self.aside is not None

    def hides_later_keys(self, mask: Tensor | None, flag: bool, q_len: int, kv_len: int) -> bool:
        """Whether a call hides later keys from every query, by its mask over all pairs or else by its flag.

        torch.compile cannot read a mask: then it is as the layer, and the compiled graph asserts it.
        """
        if mask is None:
            return flag or (q_len == 1 and self.causal)
        if not torch.compiler.is_compiling():
            return hides_future(mask, q_len, kv_len)
        if self.causal:
            assert_hides_future(mask, q_len, kv_len, self.name)
        return self.causal

    def pattern_at(self, q_len: int, kv_len: int) -> BlockPattern:
        """Return the pattern for a call's lengths in tokens."""
        assert self._pattern is not None
        return at_lengths(self._pattern, q_len, kv_len)

    def take_statistics(self, kinds: tuple[str, ...] = STATISTICS) -> BlockStatistics | None:
        """Return the collected statistics of some kinds, on the CPU, and drop all; others never leave the device."""
        statistics, self.statistics = self.statistics, None
        own, self.score_sums = self.score_sums, None
        if statistics is None:
            return None
        if self.score is not None:
            statistics = statistics.beside(own, self.score.kind)
        taken = statistics.only(kinds)
        return BlockStatistics(taken.sums.cpu(), taken.counts.cpu(), kinds)

    def attend(
        self,
        query: Tensor,
        key: Tensor | CachedKeys,
        value: Tensor | CachedKeys,
        options: AttentionOptions,
        *,
        dense: Callable[[], Tensor],
        dropped: int | None = 0,
        causal: bool | None = None,
    ) -> Tensor:
        """Compute attention in the layer's mode.

        Args:
            query: (batch, num_heads, q_len, head_dim).
            key: (batch, num_kv_heads, kv_len, head_dim), or the `CachedKeys` of a `PatternCache`.
            value: (batch, num_kv_heads, kv_len, value_dim), or the `CachedKeys` of a `PatternCache`.
            options: The options of the call.
            dense: The model's own attention.
            dropped: Keys of the sequence before these, which a cache has dropped and no query sees; None if a query may
                see some.
            causal: Whether this call hides later keys from every query. If not, the masks among its options hide what
                is hidden. None: as the layer.

        Returns:
            (batch, num_heads, q_len, value_dim).

        Raises:
            ValueError: If the call has another number of heads than the layer, or keys that were evicted by another
                pattern.
        """
        if self.aside is not None:
            return dense()
        if (query.shape[1], key.shape[1]) != (self.num_heads, self.num_kv_heads):
            raise ValueError(
                f"Layer {self.name!r} must be called with {self.num_heads} query and {self.num_kv_heads} key heads, "
                f"got {query.shape[1]} and {key.shape[1]}. Add it to `protected_layers` if it changes its heads."
            )
        if isinstance(key, CachedKeys) or isinstance(value, CachedKeys):
            cached = self._cached(key, value)
            if cached.first is None:
                return cached.attend(query, options, self._decode)
            key, value = cached.first
        call = _Call(query, key, value, options, self.causal if causal is None else causal)
        traces = torch.compiler.is_compiling() and self.traceable and call.causal == self.causal
        traced = check_backend(self.backend).traced if traces else None
        if traced is not None:
            return traced(query, key, value, self._version, self.causal, options)
        self._watch(call)
        if self.idle:
            return dense()
        if self.mode == "dense" or self._pattern is None:
            return self._with_gradient(dense(), call)
        if call.q_len != call.kv_len:
            if dropped is None:
                raise ValueError(
                    f"Layer {self.name!r} sees a window of its tokens, and its cache may have dropped keys that the "
                    "pattern counts. Generate with past_key_values=PatternCache(model), or with DynamicCache() if "
                    "the former refuses the model."
                )
            return self._attend_cached(call, dropped)
        pattern = self._pattern_of(call)
        if call.causal and not pattern.causal:
            call = call._replace(options=_causal_too(options, call.q_len, query.device))
        backend = moving_backend(query, pattern, call.options) if self.mode == "masked" else self.backend
        output = block_sparse_attention(query, key, value, pattern, call.options, backend=backend)
        return self._with_gradient(output, call)

    def _pattern_of(self, call: _Call) -> BlockPattern:
        """Return the pattern for a call's lengths; if the call shows later keys, it keeps all of these."""
        pattern = self.pattern_at(call.q_len, call.kv_len)
        return opened(pattern) if pattern.causal and not call.causal else pattern

    def _watch(self, call: _Call) -> None:
        """Record the shape of a training call, and probe it if probing is on."""
        # A checkpointed layer runs again inside the backward pass: it was probed and counted the first time.
        first_run = torch._C._current_graph_task_id() == -1  # type: ignore[attr-defined, unused-ignore]
        if not first_run or not (torch.is_grad_enabled() or self.probe_block_size is not None):
            return
        if call.q_len == call.kv_len:
            if not self.seen and self._pattern is None and self.statistics is None:  # no trial run has shown it
                self.causal = call.causal
            self.seen = True
            self.last_shape = call.shape()
            if self.probe_block_size is not None:
                self._probe(call, self.probe_block_size)
        elif self.probe_block_size is not None and torch.is_grad_enabled():  # without gradients it is a decoding step
            if not self.seen and not call.causal and self._pattern is None:
                self.refuse(f"cross-attention ({call.q_len} queries, {call.kv_len} keys)")
                return
            raise ValueError(
                f"Layer {self.name!r} must attend to its own tokens in training, got {call.q_len} queries and "
                f"{call.kv_len} keys. Train without `past_key_values`: patterns hold no prefix and no cached keys."
            )

    def refuse(self, problem: str) -> None:
        """Leave the layer dense from now on, with a warning, if the refused call is its first.

        Args:
            problem: Why the call cannot be pruned.

        Raises:
            ValueError: If other calls of the layer could be pruned.
        """
        if self.aside is not None:
            return
        if self.seen or self._pattern is not None:
            raise ValueError(
                f"Layer {self.name!r} must be called with its own tokens and masks that only hide keys, as it was "
                f"before, got another call: {problem}. Give an example input of the model "
                "(LightningModule.example_input_array, or `example`): the layer is then left dense."
            )
        self.aside, self.statistics = problem, None
        log.warning(
            "This attention layer stays dense: %r: %s. It is left out of all totals; give an example input of the "
            "model (LightningModule.example_input_array, or `example`) to know before training.",
            self.name,
            problem,
        )

    def _probe(self, call: _Call, block_size: tuple[int, int]) -> None:
        call = call.detached()
        if self.mass:
            seen = probe_attention(call.query, call.key, block_size, causal=call.causal, options=call.options)
            seen = per_document(seen, call.options, block_size, call.causal, "row", "sample")
            self.statistics = seen if self.statistics is None else self.statistics + seen
        if self.score is not None and self.score.sees != "gradient":
            self._add_to_score(self.score, call, block_size)

    def _with_gradient(self, output: Tensor, call: _Call) -> Tensor:
        """Show the output's gradient to the score in the backward pass, if the score sees gradients.

        Unlike a probe of the forward pass this counts recomputations too: with reentrant checkpointing only these have
        a backward pass, and without it both passes must save the same tensors. The gradient arrives once.
        """
        score, block_size = self.score, self.probe_block_size
        if score is None or score.sees != "gradient" or block_size is None or not output.requires_grad:
            return output
        if call.q_len != call.kv_len:
            return output

        query, key, value, options, causal = call

        # It outlives the forward pass, so it must not hold the call: checkpointing lets the call's tensors go.
        def add(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> None:
            saved = _Call(query, key, value, options, causal)
            self._add_to_score(score, saved, block_size, gradient.float() / self.gradient_scale)

        return with_gradient(output, query, key, value, add)

    def _add_to_score(
        self, score: Score, call: _Call, block_size: tuple[int, int], gradient: Tensor | None = None
    ) -> None:
        query, key, value, options, causal = call
        pattern = None if self.mode == "dense" or self._pattern is None else self._pattern_of(call)
        seen = probe_score(
            score, query, key, value, block_size, causal=causal, options=options, gradient=gradient, pattern=pattern
        )
        seen = per_document(seen, options, block_size, causal, score.per)
        self.score_sums = seen if self.score_sums is None else self.score_sums + seen

    @property
    def _decode(self) -> Decode | None:
        """The decoding of the backend that the layer was swapped to, which has no gradients."""
        return check_backend(self.backend).decode if self.mode == "sparse" and not torch.is_grad_enabled() else None

    def _cached(self, key: Tensor | CachedKeys, value: Tensor | CachedKeys) -> CachedKeys:
        """Check that the keys and values of a `PatternCache` are of this layer's pattern, and return them."""
        if not isinstance(key, CachedKeys) or value is not key:
            raise ValueError(
                f"Layer {self.name!r} must get keys and values from one PatternCache, got others. "
                "Use a cache that evicts nothing, such as DynamicCache()."
            )
        if self.mode == "dense" or self._pattern is None or not key.pattern.equals(self._pattern):
            raise ValueError(
                f"Layer {self.name!r} must have the pattern that its PatternCache evicted by, got another. The pattern "
                "changed, or the cache is of another model. Make a new cache."
            )
        return key

    def _attend_cached(self, call: _Call, dropped: int) -> Tensor:
        """Compute attention of the last queries against a cache: by a backend's decoding, by rows, or under a mask."""
        assert self._pattern is not None
        query, key, value, options, causal = call
        decode = None if dropped else self._decode
        # The last query sees every key in any case.
        if decode is not None and self._pattern.causal and (causal or call.q_len == 1):
            decoded = decode(query, key, value, self._pattern, options)
            if decoded is not None:
                return decoded
        if not dropped and causal and spans_rows(self._pattern, call.q_len):
            return attend_chunk(query, key, value, self._pattern, options)
        mask = last_rows(self._pattern, call.q_len, dropped + call.kv_len, causal, query.device)[None, ..., dropped:]
        visible = options.token_mask(call.q_len, call.kv_len, query.device)
        group = self.num_heads // self.num_kv_heads
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return masked_attention(query, keys, values, mask if visible is None else mask & visible, options)


class _Call(NamedTuple):
    """One attention call of a layer; tensors as `PrunableAttention.attend` takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: AttentionOptions
    causal: bool

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    def detached(self) -> _Call:
        return self._replace(query=self.query.detach(), key=self.key.detach(), value=self.value.detach())

    def shape(self) -> CallShape:
        """Everything about the call that its time depends on."""
        batch, _, q_len, head_dim = self.query.shape
        options = self.options.with_masks(lambda mask: mask.to("meta") if mask.dtype == torch.bool else mask)
        dtype, device, value_dim = self.value.dtype, self.query.device, self.value.shape[3]
        return CallShape(batch, q_len, self.kv_len, head_dim, dtype, device, options, value_dim)


def _causal_too(options: AttentionOptions, length: int, device: torch.device) -> AttentionOptions:
    """Return the options of a causal call under a bidirectional pattern: causality becomes a mask."""
    lower = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    return replace(options, attn_mask=lower if options.attn_mask is None else options.attn_mask & lower)
