"""Timing a layer's attention, dense against sparse, on its own shapes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.kernels import block_sparse_attention

log = logging.getLogger(__name__)


def time_attention(
    layer: PrunableAttention, backends: Sequence[str], repeats: int = 3, tuned: bool = False
) -> dict[str, float]:
    """Milliseconds of a forward and backward pass on the layer's last training shape, with its pattern.

    All take turns, and of each the fastest turn counts: what else runs on a machine can only make a clock run longer,
    and seldom hits all turns of one candidate alone.

    Args:
        layer: It has a pattern and has seen a training call.
        backends: To measure beside dense SDPA.
        repeats: Turns.
        tuned: Find the backends' launch configurations first, where they have any.

    Returns:
        "dense" and every backend that takes the layer's shape and blocks -> milliseconds.
    """
    query, key, value = inputs = _inputs(layer)
    pattern = layer.pattern_at(query.shape[2], key.shape[2])
    group = layer.num_heads // layer.num_kv_heads

    def dense() -> Tensor:
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return torch.as_tensor(F.scaled_dot_product_attention(query, keys, values, is_causal=layer.causal))

    calls = {"dense": partial(_milliseconds, dense, inputs)}
    for backend in backends:
        attend = partial(block_sparse_attention, query, key, value, pattern, backend=backend)
        try:
            if tuned:
                tune(layer, backend)
            _milliseconds(attend, inputs)  # what a backend refuses it refuses before it runs
        except ValueError as error:
            log.info("%s: not measured with %s: %s", layer.name, backend, error)
        else:
            calls[backend] = partial(_milliseconds, attend, inputs)
    calls["dense"]()  # first runs build tables and compile
    turns = [{name: call() for name, call in calls.items()} for _ in range(repeats)]
    return {name: min(turn[name] for turn in turns) for name in calls}


def tune(layer: PrunableAttention, backend: str) -> None:
    """Find the backend's fastest launch configurations for the layer's last training shape, where it has any.

    Raises:
        ValueError: If the backend does not take the shape.
    """
    if backend != "triton":
        return
    from sparse_prune.kernels.triton.attend import check_supported
    from sparse_prune.kernels.triton.tuning import tune as tune_kernels

    query, key, value = _inputs(layer)
    check_supported(query)
    tune_kernels(query, key, value, layer.pattern_at(query.shape[2], key.shape[2]))


def _inputs(layer: PrunableAttention) -> tuple[Tensor, Tensor, Tensor]:
    assert layer.last_shape is not None
    batch, q_len, kv_len, head_dim, dtype, device = layer.last_shape
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, length: int) -> Tensor:
        shape = (batch, heads, length, head_dim)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device, requires_grad=True)

    heads, kv_heads = layer.num_heads, layer.num_kv_heads
    return random(heads, q_len), random(kv_heads, kv_len), random(kv_heads, kv_len)


@torch.enable_grad()  # type: ignore[untyped-decorator, unused-ignore]
def _milliseconds(attend: Callable[[], Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    device = inputs[0].device
    grad = torch.ones_like(inputs[0])
    _wait(device)
    start = time.perf_counter()
    torch.autograd.grad(attend(), inputs, grad)
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
