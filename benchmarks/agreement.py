"""Whether the Triton kernels agree with the float64 reference, with another backend's own error as the measure."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention

NAMES = ("output", "gradient of query", "gradient of key", "gradient of value")


def check(
    tensors: tuple[Tensor, Tensor, Tensor], grad: Tensor, pattern: BlockPattern,
    options: AttentionOptions | None = None, eager: str = "sdpa",
) -> dict[str, float]:  # fmt: skip
    """Largest error of output and gradients, as a share of what is allowed.

    Allowed is three times the error of another backend in the same dtype, and four units of that dtype: in the largest
    number, or in the terms whose difference the gradients of query and key are, where these cancel. The kernels take
    one of them, the row sum of the output times its gradient, from an output that was rounded.

    Args:
        tensors: Query (batch, num_heads, q_len, head_dim), key and value (batch, num_kv_heads, kv_len, head_dim).
        grad: Of the loss in the output, in its shape.
        pattern: The connections to keep, for these lengths.
        options: Masks, scale, dropout, soft cap.
        eager: The other backend.

    Raises:
        ArithmeticError: If an error is more than is allowed, or NaN: the kernels are wrong.
    """
    dtype = tensors[0].dtype
    exact = _results(tensors, grad, pattern, options, "reference", torch.float64)
    ours, own = (_results(tensors, grad, pattern, options, backend, dtype) for backend in ("triton", eager))
    query, key, _ = (tensor.detach().double().abs().max() for tensor in tensors)
    scale = options.scale if options is not None and options.scale is not None else tensors[0].shape[-1] ** -0.5
    term = (grad.double() * exact[0]).sum(-1).abs().max() * scale
    terms = {"gradient of query": term * key, "gradient of key": term * query}
    found = {}
    for name, is_, other, wanted in zip(NAMES, ours, own, exact, strict=True):
        largest = torch.stack([wanted.abs().max(), terms.get(name, torch.zeros_like(term))]).max().clamp(min=1.0)
        allowed = 3 * (other - wanted).abs().max() + 4 * torch.finfo(dtype).eps * largest
        found[name] = float((is_ - wanted).abs().max() / allowed)
    wrong = {name: share for name, share in found.items() if not share <= 1.0}
    if wrong:
        raise ArithmeticError(", ".join(f"{name} {share:.3g} times what is allowed" for name, share in wrong.items()))
    return found


def _results(
    tensors: tuple[Tensor, ...], grad: Tensor, pattern: BlockPattern, options: AttentionOptions | None, backend: str,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    cast = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    output = block_sparse_attention(cast[0], cast[1], cast[2], pattern, options, backend=backend)
    found = [output.detach(), *torch.autograd.grad(output, cast, grad.to(dtype))]
    return [tensor.double() for tensor in found]
