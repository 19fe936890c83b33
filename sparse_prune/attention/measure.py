"""Measures a layer's attention, dense and sparse, on calls like its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.attention.softcap import softcapped
from sparse_prune.clock import milliseconds
from sparse_prune.kernels import AttentionOptions, block_sparse_attention, check_backend
from sparse_prune.pattern import BlockPattern

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def time_attention(
    layer: PrunableAttention,
    backends: Sequence[str],
    repeats: int = 3,
    pattern: BlockPattern | None = None,
    hidden: bool = True,
) -> dict[str, float]:
    """Time a forward and backward pass like the layer's last training call, with its pattern or another.

    On a GPU this is the device's time alone, without the launching of kernels, unless training does not hide it (see
    `clock`). Candidates take turns, and each one's fastest turn counts: other programs can only prolong a measurement,
    and seldom hit all turns of one candidate. A candidate that fails, for lack of memory say, is left out.

    Args:
        layer: A layer that has seen a training call.
        backends: Backends to measure beside dense attention.
        repeats: Number of turns.
        pattern: A pattern of the lengths of that call. None: the layer's own.
        hidden: Whether training hides the launching of kernels, as `clock.hides_host` says.

    Returns:
        "dense" and every backend that can do the call -> milliseconds.
    """
    pattern = pattern or _own_pattern(layer)
    clock = partial(_time, pattern=pattern, hidden=hidden)
    times = _each(layer, ["dense", *backends], clock)  # first runs build tables and compile
    turns = []
    for _ in range(repeats):
        times = _each(layer, times, clock)
        turns.append(times)
    return {name: min(turn[name] for turn in turns) for name in times}


def fastest(times: Mapping[str, float]) -> str:
    """Return the fastest of `time_attention`'s candidates; "dense" if none is faster or none ran."""
    return min(times, key=times.__getitem__, default="dense")


def in_words(times: Mapping[str, float]) -> str:
    """Format the result of `time_attention` for a log; empty without one."""
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items())


def _each(
    layer: PrunableAttention, backends: Iterable[str], work: Callable[[PrunableAttention, str], _T]
) -> dict[str, _T]:
    """Return the results of `work` by backend, without those that fail: a measurement must not end a run."""
    results = {}
    for backend in backends:
        try:
            results[backend] = work(layer, backend)
        except Exception as error:
            level = logging.INFO if isinstance(error, ValueError) else logging.WARNING  # a refusal is no accident
            log.log(level, "%s: not measured with %s: %s: %s", layer.name, backend, type(error).__name__, error)
    return results


def _own_pattern(layer: PrunableAttention) -> BlockPattern:
    assert layer.last_shape is not None
    return layer.pattern_at(layer.last_shape.q_len, layer.last_shape.kv_len)


def tune(
    layer: PrunableAttention, backends: Sequence[str], seconds: float, pattern: BlockPattern | None = None
) -> list[str]:
    """Find the fastest launch configurations of backends that have some, for the layer's last training call.

    Args:
        layer: A layer that has seen a training call.
        backends: Names of backends.
        seconds: Seconds after which no other configuration is tried.
        pattern: As in `time_attention`.

    Returns:
        The backends that can do the call.
    """
    pattern, end = pattern or _own_pattern(layer), time.monotonic() + seconds

    def find(layer: PrunableAttention, backend: str) -> None:
        search = check_backend(backend).tune
        if search is not None:
            search(*_inputs(layer), pattern, _options(layer), end - time.monotonic())

    return list(_each(layer, backends, find))


@torch.enable_grad()  # type: ignore[untyped-decorator, unused-ignore]
def _time(layer: PrunableAttention, backend: str, pattern: BlockPattern, hidden: bool) -> float:
    inputs = _inputs(layer)
    attend = _attention(layer, backend, pattern, *inputs)
    grad = inputs[0].new_ones(*inputs[0].shape[:3], inputs[2].shape[3])
    return milliseconds(lambda: torch.autograd.grad(attend(), inputs, grad), grad.device, hidden)


def _attention(
    layer: PrunableAttention, backend: str, pattern: BlockPattern, query: Tensor, key: Tensor, value: Tensor
) -> Callable[[], Tensor]:
    """Make attention like the layer's with a backend, or "dense", as a model computes it without a pattern."""
    q_len, kv_len, options = query.shape[2], key.shape[2], _options(layer)
    if backend != "dense":
        return partial(block_sparse_attention, query, key, value, pattern, options, backend=backend)
    if options.softcap is not None:
        return partial(softcapped, query, key, value, layer.causal, options)
    mask = options.token_mask(q_len, kv_len, query.device)
    if mask is not None and layer.causal:
        mask = mask & torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril()

    # As transformers decides: with a mask, or beyond 256 channels, its call would get a slow kernel with shared keys.
    shared = not layer.repeats_keys or (mask is None and query.shape[3] <= 256)
    group = layer.num_heads // layer.num_kv_heads

    def dense() -> Tensor:
        keys, values = (t if shared else t.repeat_interleave(group, 1) for t in (key, value))
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            mask,
            options.dropout_p,
            is_causal=layer.causal and mask is None,
            scale=options.scale,
            enable_gqa=shared and group > 1,
        )

    return dense


def _options(layer: PrunableAttention) -> AttentionOptions:
    """Return the options of the last call, with masks that hide nothing: time depends on their shapes alone.

    Documents are those of the call, as time depends on their lengths.
    """
    assert layer.last_shape is not None
    device = layer.last_shape.device

    def shown(mask: Tensor) -> Tensor:
        return torch.ones_like(mask, device=device) if mask.dtype == torch.bool else mask

    return layer.last_shape.options.with_masks(shown)


def _inputs(layer: PrunableAttention) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.last_shape is not None
    call = layer.last_shape
    generator = torch.Generator(call.device).manual_seed(0)

    def random(heads: int, length: int, channels: int) -> Tensor:
        shape = (call.batch, heads, length, channels)
        return torch.randn(shape, generator=generator, dtype=call.dtype, device=call.device, requires_grad=True)

    (wide, value_wide), kv_heads = call.channels, layer.num_kv_heads
    query, key = random(layer.num_heads, call.q_len, wide), random(kv_heads, call.kv_len, wide)
    return query, key, random(kv_heads, call.kv_len, value_wide)
