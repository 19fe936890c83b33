"""Timing a layer's attention, dense against sparse, on its own shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.attention.layer import PrunableAttention
from sparse_prune.kernels import block_sparse_attention


def time_dense(layer: PrunableAttention, repeats: int = 3) -> float:
    """Milliseconds of one forward and backward pass of dense SDPA on the layer's last training shape."""
    query, key, value = _inputs(layer)
    group = layer.num_heads // layer.num_kv_heads

    def attend() -> Tensor:
        out: Tensor = F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), is_causal=layer.causal
        )
        return out

    return _milliseconds(attend, (query, key, value), repeats)


def time_sparse(layer: PrunableAttention, backend: str, repeats: int = 3) -> float:
    """Milliseconds of one forward and backward pass of a backend with the layer's pattern on the same shape."""
    query, key, value = _inputs(layer)
    pattern = layer.pattern_at(query.shape[2], key.shape[2])
    return _milliseconds(
        lambda: block_sparse_attention(query, key, value, pattern, backend=backend), (query, key, value), repeats
    )


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
def _milliseconds(attend: Callable[[], Tensor], inputs: tuple[Tensor, Tensor, Tensor], repeats: int) -> float:
    device = inputs[0].device
    grad = torch.ones_like(inputs[0])

    def run() -> float:
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(attend(), inputs, grad)
        _wait(device)
        return 1e3 * (time.perf_counter() - start)

    run()  # the first run builds tables and compiles
    return statistics.median(run() for _ in range(repeats))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
