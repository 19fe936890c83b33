"""Calls a function with the gradient of an attention output in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OnGradient = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def with_gradient(output: Tensor, query: Tensor, key: Tensor, value: Tensor, then: OnGradient) -> Tensor:
    """Return the output unchanged; the backward pass calls `then` with its gradient and the inputs.

    The inputs are saved as every operator of torch saves its own, so activation checkpointing drops and recomputes
    them. The gradient arrives once, however often the forward pass ran. `then` is called without grad mode with query,
    key, value and the gradient, which it must not change.
    """
    watched: Tensor = _Watched.apply(  # type: ignore[no-untyped-call, unused-ignore]
        output, query.detach(), key.detach(), value.detach(), then
    )
    return watched


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, then: OnGradient) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.then = then
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        with torch.no_grad():
            ctx.then(*ctx.saved_tensors, gradients[0].detach())
        return gradients[0], None, None, None, None
