"""Measures of a causal language model and its cache: loss, KV bytes, tokens per second."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from sparse_prune.attention import PrunableAttention
from sparse_prune.attention.handles import handles_in
from sparse_prune.clock import now

MakeCache = Callable[[], Any]


@dataclass(frozen=True)
class CacheCost:
    """The cost of prefill and decoding of one sequence."""

    kv_bytes: int
    """Growth of the allocator's live bytes by the prefill, of which only the cache was kept."""
    prefill_tokens_per_s: float
    """Tokens of the prompt per second."""
    decode_tokens_per_s: float
    """Tokens per second after the prompt, one at a time."""


@torch.no_grad()
def mean_loss(model: Any, sequences: Tensor, make_cache: MakeCache, chunk: int = 1024) -> float:
    """Measure the loss in nats per token through a cache, as in generation: keys that it has evicted are missed.

    Args:
        model: A transformers causal language model.
        sequences: Tokens, (sequences, length), length at least 2.
        make_cache: Makes an empty cache for one sequence.
        chunk: Tokens per forward pass: logits of a whole long sequence would not fit.
    """
    total = 0.0
    for sequence in sequences.to(model.device):
        cache, (inputs, targets) = make_cache(), (sequence[:-1], sequence[1:])
        for start in range(0, len(inputs), chunk):
            logits = model(input_ids=inputs[None, start : start + chunk], past_key_values=cache).logits[0]
            total += float(F.cross_entropy(logits.float(), targets[start : start + chunk], reduction="sum"))
    return total / sequences.shape[0] / (sequences.shape[1] - 1)


@torch.no_grad()
def cache_cost(model: Any, sequence: Tensor, make_cache: MakeCache, decode: int, chunk: int = 1024) -> CacheCost:
    """Measure the prefill of a sequence and greedy decoding after it.

    Args:
        model: A transformers causal language model.
        sequence: Tokens, (length,).
        make_cache: Makes an empty cache.
        decode: Tokens to decode, at least 1; one more is decoded before, to warm up.
        chunk: Tokens per forward pass of the prefill.
    """
    cache, inputs = make_cache(), sequence[None].to(model.device)
    # The first call at a length makes what later ones find: tables of patterns, the device's kernels.
    _prefill(model, inputs, make_cache(), chunk)
    before = live_bytes(model.device)
    start = now(model.device)
    first = int(_prefill(model, inputs, cache, chunk))  # a number: only the cache is held on to
    prefill = now(model.device) - start
    grown = live_bytes(model.device) - before
    token = torch.full((1, 1), first, device=model.device)
    model(input_ids=token, past_key_values=cache)  # the first step makes masks that later ones find
    start = now(model.device)
    for _ in range(decode):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
    seconds = now(model.device) - start
    return CacheCost(grown, inputs.shape[1] / prefill, decode / seconds)


def fresh_cache(model: Any) -> Any:
    """Make an empty cache for a transformers decoder: a `PatternCache` if it has patterns, else a `DynamicCache`."""
    from transformers import DynamicCache

    from sparse_prune.cache import PatternCache

    if any(handle.mode != "dense" for handle in handles_of(model)):
        return PatternCache(model)
    return DynamicCache(config=model.config)


def handles_of(model: Any) -> list[PrunableAttention]:
    """Return the model's handles; none if its attention was never taken over."""
    return list(handles_in(model).values())


def live_bytes(device: torch.device) -> int:
    """Count the bytes that tensors occupy: by the allocator on CUDA, by all live tensors' storages on the CPU."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules warn when they are looked at
        # Fake tensors of compiled functions have no memory.
        kinds = [(thing, type(thing)) for thing in gc.get_objects()]
        tensors = [thing for thing, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _prefill(model: Any, inputs: Tensor, cache: Any, chunk: int) -> Tensor:
    """Prefill, and return the next token, (1, 1)."""
    for start in range(0, inputs.shape[1], chunk):
        logits = model(input_ids=inputs[:, start : start + chunk], past_key_values=cache, logits_to_keep=1).logits
    return torch.as_tensor(logits[:, -1:].argmax(-1))
