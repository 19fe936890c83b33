"""A KV cache that holds only what a later query may attend to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparse_prune.attention.cached_keys import CachedKeys, HeadKeys, HeldKeys
from sparse_prune.attention.handles import handle_of
from sparse_prune.attention.hf import attached_layers
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.pattern import BlockPattern, num_blocks


class PatternCache(Cache):  # type: ignore[misc]
    """A transformers cache that evicts by the model's patterns.

    Per layer and KV head it holds the key blocks that any of the head's queries may still attend to
    (`BlockPattern.needed_after`) and frees the others: sinks, the head's reach, kept columns. Layers without a
    pattern hold everything, and so do those whose keys other layers use again (Gemma 3n). Outputs are those of the same
    patterns with a cache that evicts nothing.

        model.generate(**inputs, past_key_values=PatternCache(model))

    Greedy decoding, sampling, beams, padded batches, continued chats (pass the cache again) and chunked prefill
    work; so does assisted decoding from an empty cache, for which blocks stay until the candidates are judged. Chunks
    of more tokens than a block compute their kept blocks alone.
    (If a cache of any kind holds tokens already, transformers gives it the whole text again.) Threads may share a
    model, each with a cache of its own. Positions count from the padded start, as in the patterns. For inference only.

    Args:
        model: A decoder whose attention was taken over (`sparse_prune.attention.attach`, the callbacks, or
            `sparse_prune.export.load`). Its patterns must not change while the cache is in use.

    Raises:
        ValueError: If the model's attention was not taken over, if a layer is not causal self-attention, or if the
            model caches other things than keys and values of every layer.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = {handle_of(module): module for module in model.modules()}
        handles = attached_layers(model)
        reuses = [getattr(modules[handle], "is_kv_shared_layer", False) for handle in handles]
        _check_own_cache(model, reuses)
        # Layers that reuse keys of others need them by patterns of their own.
        stores = [any(reuses) and getattr(modules[handle], "store_full_length_kv", False) for handle in handles]
        whole = [store or reuse for store, reuse in zip(stores, reuses, strict=True)]
        super().__init__(layers=[_cache_layer(*layer) for layer in zip(handles, whole, strict=True)])

    def nbytes(self) -> int:
        """Count the bytes of all storages that the cache holds on to, masks and spare room included."""
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self._tensors())}.values())

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, PatternLayer):
                held = [] if layer.held is None else [layer.held, layer.held.blocks, *layer.held.head_sets]
                for part in held:
                    yield from (value for value in vars(part).values() if isinstance(value, Tensor))
            elif layer.keys is not None:
                yield from (layer.keys, layer.values)


class PatternLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `PatternCache`."""

    is_croppable = True

    def __init__(self, handle: PrunableAttention, pattern: BlockPattern) -> None:
        super().__init__()
        self.handle, self.pattern = handle, pattern
        self.length = 0
        """Tokens seen."""
        self.evicted_at = 0
        """Length at the latest eviction: the cache cannot go back to a shorter one."""
        self.record_past = False
        """Whether nothing is evicted, because new tokens may be taken back."""
        self.judged_at: int | None = None
        """Length at the latest `crop` while recording; None before the first one."""
        self.held: HeldKeys | None = None
        """None before the first token."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PatternLayer:
        """Copy the layer for the same model: the handle is shared."""
        other = PatternLayer(self.handle, self.pattern)
        other.__dict__.update(self.__dict__)
        other.held = copy.deepcopy(self.held)
        return other

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember the dtype and the device of the first keys."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[CachedKeys, CachedKeys]:
        """Take new keys and values, (batch, num_kv_heads, new tokens, head_dim).

        Returns:
            Everything to attend to, once in place of keys and once in place of values.

        Raises:
            ValueError: If gradients would be lost.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("`PatternCache` keeps no gradients. Call the model under torch.no_grad().")
        if key_states.shape[1] != self.handle.num_kv_heads:
            raise ValueError(
                f"`PatternCache` must get keys and values of {self.handle.num_kv_heads} heads for layer "
                f"{self.handle.name!r}, got {key_states.shape[1]}: the model caches what it computes them from, as "
                "multi-head latent attention does. Generate with past_key_values=DynamicCache()."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        if self.judged_at is not None and start > self.judged_at:
            # No `crop` judged the latest tokens: they were no candidates.
            self.record_past = False
        block, shape = self.pattern.block_size[1], (*key_states.shape[:2], start + new, key_states.shape[3])
        if not start:
            # The first queries attend to keys that came with them: what is stored is already what lasts.
            self.length = new
            blocks = torch.arange(num_blocks(new, block))
            heads = zip(key_states.unbind(1), value_states.unbind(1), strict=True)
            self._evict([HeadKeys(blocks, *head) for head in heads])
            first = CachedKeys(self._known(), shape, self.pattern, (key_states, value_states))
            return first, first
        crossed = new > -start % block
        if crossed:
            # No query after `start` needs what goes now, the new ones included.
            self._evict(self._known().heads(), room=new)
        self._known().write(key_states, value_states, num_blocks(start + new, block) * block - start)
        self.length += new
        cached = CachedKeys(self._known(), shape, self.pattern)
        if crossed and new > 1:
            self._evict()
        return cached, cached

    def _known(self) -> HeldKeys:
        assert self.held is not None
        return self.held

    def _evict(self, heads: list[HeadKeys] | None = None, room: int = 0, judged: bool = False) -> None:
        """Copy what lasts of `heads` into new tensors, with room for more tokens, and free the rest.

        Without `heads` it evicts from what is held, and copies nothing if everything lasts. While recording everything
        lasts, unless all tokens are `judged`.
        """
        block = self.pattern.block_size[1]
        count = num_blocks(self.length, block)
        lasting = torch.ones(self.handle.num_kv_heads, count, dtype=torch.bool)
        if judged or not self.record_past:
            lasting = torch.unflatten(self.pattern.needed_after(self.length), 0, (self.handle.num_kv_heads, -1)).any(1)
            if self.handle.sliding_window is not None:
                lasting &= (torch.arange(count) + 1) * block > self.length - self.handle.sliding_window + 1
            if self.length % block:
                lasting[:, -1] = True
            self.evicted_at = self.length
        found = self._known().heads() if heads is None else heads
        kept = [own[head.blocks].nonzero()[:, 0] for own, head in zip(lasting, found, strict=True)]
        if heads is not None or any(len(places) < len(head.blocks) for places, head in zip(kept, found, strict=True)):
            more = num_blocks(self.length + room, block) - count
            self.held = HeldKeys.gather(found, kept, more, block, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of masks, which cover all positions, evicted or not, and the first position, 0."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def activate_past_recording(self) -> None:
        """Evict nothing until the next `crop`, so that tokens can be taken back, as assisted decoding does.

        Assisted decoding calls this once, and `crop` after every call of the model. So recording continues after a
        `crop`; it ends with the first call that has no `crop` before it.
        """
        self.record_past, self.judged_at = True, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; after `activate_past_recording`, evict what may now go.

        Args:
            tokens_to_remove: Minus the number of tokens.

        Raises:
            ValueError: If it is positive or there are fewer tokens.
            RuntimeError: If blocks were evicted that the shorter sequence needs.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"`tokens_to_remove` must lie in {-self.length}..0, minus the number of tokens, got {tokens_to_remove}."
            )
        if self.length + tokens_to_remove < self.evicted_at:
            raise RuntimeError(
                f"`crop` to {self.length + tokens_to_remove} tokens would need blocks that were evicted at "
                f"{self.evicted_at}. Call `activate_past_recording` on the cache before the tokens come."
            )
        before = num_blocks(self.length, self.pattern.block_size[1])
        self.length += tokens_to_remove
        after = num_blocks(self.length, self.pattern.block_size[1])
        if after < before:
            heads = self._known().heads()
            kept = [(head.blocks < after).nonzero()[:, 0] for head in heads]
            self.held = HeldKeys.gather(heads, kept, 0, self.pattern.block_size[1], self.length)
        if not self.length:
            self.reset()
        elif self.record_past:
            self._evict(judged=True)
            self.judged_at = self.length

    def reset(self) -> None:
        """Forget everything."""
        self.length, self.evicted_at, self.held, self.is_initialized = 0, 0, None, False
        self.record_past, self.judged_at = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples of the batch, in this order."""
        if self.held is not None:
            self.held = self.held.chosen(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample of the batch."""
        if self.held is not None:
            self.held = self.held.chosen(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("`PatternCache` cannot be offloaded. It is small: leave it on the device.")


def _check_own_cache(model: nn.Module, reuses: list[bool]) -> None:
    """Refuse models whose own cache holds anything but keys and values of each layer that does not use another's."""
    own = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    short = len(reuses) - len(own)
    kinds = zip(own + ["nothing"] * short, reuses + [False] * -short, strict=True)
    held = {kind for kind, reuse in kinds if not reuse}
    others = held - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if others:
        raise ValueError(
            f"`model` must cache keys and values of each of its {len(reuses)} layers and nothing else, got "
            f"{', '.join(sorted(others))}: some keep other states, or share keys. Use the model's own cache."
        )


def _cache_layer(handle: PrunableAttention, whole: bool) -> CacheLayerMixin:
    if whole or handle.mode == "dense" or handle.pattern is None:
        return DynamicLayer()
    if handle.pattern.q_len != handle.pattern.kv_len:
        raise ValueError(
            f"Layer {handle.name!r} must have a pattern of self-attention, got lengths "
            f"({handle.pattern.q_len}, {handle.pattern.kv_len}). Use a cache that evicts nothing."
        )
    return PatternLayer(handle, handle.pattern)
