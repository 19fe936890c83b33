"""A KV cache that holds only what a later query may attend to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparse_prune.attention.handles import handle_of
from sparse_prune.attention.hf import attached_layers
from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.packed import Bucket, PackedKeys
from sparse_prune.pattern import BlockPattern, num_blocks


class PatternCache(Cache):  # type: ignore[misc]
    """A transformers cache that evicts by the model's patterns.

    Per layer and KV head it holds the key blocks that any of the head's queries may still attend to
    (`BlockPattern.needed_after`) and frees the others: sinks, the head's reach, kept columns. Layers without a
    pattern hold everything, and so do those whose keys other layers use again (Gemma 3n). Outputs are those of the same
    patterns with a cache that evicts nothing.

        model.generate(**inputs, past_key_values=PatternCache(model))

    Greedy decoding, sampling, beams, padded batches, continued chats (pass the cache again) and chunked prefill
    work; so does assisted decoding from an empty cache, for which blocks stay until the candidates are judged.
    (transformers gives a filled cache, of whatever kind, the whole text again.) Threads may share a model, each with a
    cache of its own. Positions count from the padded start, as in the patterns. For inference only.

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
        # What others use again they need by patterns of their own.
        stores = [any(reuses) and getattr(modules[handle], "store_full_length_kv", False) for handle in handles]
        whole = [store or reuse for store, reuse in zip(stores, reuses, strict=True)]
        super().__init__(layers=[_cache_layer(*layer) for layer in zip(handles, whole, strict=True)])

    def nbytes(self) -> int:
        """Bytes of all storages that the cache holds on to, masks and spare room included."""
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self._tensors())}.values())

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            if isinstance(layer, PatternLayer):
                for bucket in layer.buckets:
                    yield from (value for value in vars(bucket).values() if isinstance(value, Tensor))
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
        """Length at the latest eviction: the cache cannot go back behind it."""
        self.record_past = False
        """Evict nothing: what comes may be taken back."""
        self.judged_at: int | None = None
        """Length at the latest `crop` while recording; None before the first one."""
        self.buckets: tuple[Bucket, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> PatternLayer:
        """A copy for the same model: the handle is not copied."""
        other = PatternLayer(self.handle, self.pattern)
        other.__dict__.update(self.__dict__)
        other.buckets = tuple(Bucket(b.heads, b.blocks, b.keys.clone(), b.values.clone()) for b in self.buckets)
        return other

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember what kind of tensors come."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedKeys, PackedKeys]:
        """Take new keys and values, (batch, num_kv_heads, new tokens, head_dim).

        Returns:
            What to attend to, as keys and as values.

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
            heads = torch.arange(key_states.shape[1])
            blocks = torch.arange(num_blocks(new, block)).expand(len(heads), -1)
            self.length = new
            self.buckets = (Bucket(heads, blocks, key_states, value_states),)
            self._evict(copy=True)
            first = PackedKeys(self.buckets, shape, self.pattern, (key_states, value_states))
            return first, first
        crossed = new > -start % block
        if crossed:
            # No query after `start` needs what goes now, the new ones included.
            self._evict(room=new, copy=True)
        fill = -num_blocks(start + new, block) * block + start
        for bucket in self.buckets:
            at = bucket.keys.shape[2] + fill
            index = bucket.index(key_states.shape[1])
            bucket.keys[:, :, at : at + new] = key_states[:, index]
            bucket.values[:, :, at : at + new] = value_states[:, index]
        self.length += new
        packed = PackedKeys(self.buckets, shape, self.pattern)
        if crossed and new > 1:
            self._evict()
        return packed, packed

    def _evict(self, room: int = 0, copy: bool = False, judged: bool = False) -> None:
        """Copy what lasts into tensors of its own, with room for more tokens; what does not last is freed.

        Where everything lasts nothing is copied unless `copy` says so. While recording everything lasts, unless all
        tokens are `judged`.
        """
        block = self.pattern.block_size[1]
        held = num_blocks(self.length, block)
        lasting = torch.ones(self.handle.num_kv_heads, held, dtype=torch.bool)
        if judged or not self.record_past:
            lasting = torch.unflatten(self.pattern.needed_after(self.length), 0, (self.handle.num_kv_heads, -1)).any(1)
            if self.handle.sliding_window is not None:
                lasting &= (torch.arange(held) + 1) * block > self.length - self.handle.sliding_window + 1
            if self.length % block:
                lasting[:, -1] = True
            self.evicted_at = self.length
        fresh = torch.arange(held, num_blocks(self.length + room, block))
        chosen: dict[int, list[tuple[int, Tensor, Bucket, int]]] = {}
        for bucket in self.buckets:
            for place, head in enumerate(bucket.heads.tolist()):
                kept = lasting[head, bucket.blocks[place]].nonzero()[:, 0]
                chosen.setdefault(len(kept), []).append((head, kept, bucket, place))
        if copy or any(len(kept) < bucket.blocks.shape[1] for p in chosen.values() for _, kept, bucket, _ in p):
            self.buckets = tuple(self._bucket(count, parts, fresh) for count, parts in sorted(chosen.items()))

    def _bucket(self, count: int, parts: list[tuple[int, Tensor, Bucket, int]], fresh: Tensor) -> Bucket:
        """Heads that keep `count` blocks, given as (head, kept blocks' places, old bucket, place in it)."""
        parts = sorted(parts, key=lambda part: part[0])
        block = self.pattern.block_size[1]
        old = parts[0][2]
        shape = (old.keys.shape[0], len(parts), (count + len(fresh)) * block)
        keys = old.keys.new_empty(*shape, old.keys.shape[3])
        values = old.values.new_empty(*shape, old.values.shape[3])
        blocks = torch.empty(len(parts), count + len(fresh), dtype=torch.int64)
        for index, (_, kept, source, place) in enumerate(parts):
            blocks[index] = torch.cat([source.blocks[place, kept], fresh])
            slots = (kept[:, None] * block + torch.arange(block)).flatten()
            # Only the sequence's last block may be partly filled; a prompt has no room behind it.
            partly = count > 0 and int(blocks[index, count - 1]) == self.length // block
            filled = count * block - (-self.length % block if partly else 0)
            slots = slots[:filled].to(keys.device)
            keys[:, index, :filled] = source.keys[:, place, slots]
            values[:, index, :filled] = source.values[:, place, slots]
        return Bucket(torch.tensor([head for head, *_ in parts]), blocks, keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover all positions, evicted or not."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    def activate_past_recording(self) -> None:
        """Evict nothing until the next `crop`, so that it can go back: assisted decoding wants this.

        It asks once and crops after every call. So what one call brings can be taken back after a `crop` too; once a
        call comes without a `crop` before it, recording has ended.
        """
        self.record_past, self.judged_at = True, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; after `activate_past_recording`, evict what may now go.

        Args:
            tokens_to_remove: Minus the number of tokens.

        Raises:
            ValueError: If it is positive or there are not so many tokens.
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
            self.buckets = tuple(self._shortened(bucket, after) for bucket in self.buckets)
        if not self.length:
            self.reset()
        elif self.record_past:
            self._evict(judged=True)
            self.judged_at = self.length

    def _shortened(self, bucket: Bucket, blocks: int) -> Bucket:
        """Without the blocks from `blocks` on, of which every head holds all."""
        count = int((bucket.blocks[0] < blocks).sum())
        slots = slice(count * self.pattern.block_size[1])
        return Bucket(
            bucket.heads, bucket.blocks[:, :count], bucket.keys[:, :, slots].clone(), bucket.values[:, :, slots].clone()
        )

    def reset(self) -> None:
        """Forget everything."""
        self.length, self.evicted_at, self.buckets, self.is_initialized = 0, 0, (), False
        self.record_past, self.judged_at = False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these samples of the batch, in this order."""
        for bucket in self.buckets:
            chosen = indices.to(bucket.keys.device)
            bucket.keys, bucket.values = bucket.keys[chosen], bucket.values[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample of the batch."""
        for bucket in self.buckets:
            bucket.keys = bucket.keys.repeat_interleave(repeats, 0)
            bucket.values = bucket.values.repeat_interleave(repeats, 0)

    def offload(self) -> None:
        """Not supported.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("`PatternCache` cannot be offloaded. It is small: leave it on the device.")


def _check_own_cache(model: nn.Module, reuses: list[bool]) -> None:
    """The model's own cache must hold keys and values of every layer that does not use another's, and nothing else."""
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
