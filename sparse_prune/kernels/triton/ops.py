"""The kernels as operators of torch.library: torch.compile and export carry them along without a graph break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import LaunchConfig
from sparse_prune.kernels.triton.launch import heads_of_a_program, launch_dkdv, launch_dq, launch_forward
from sparse_prune.kernels.triton.memory import within_memory
from sparse_prune.kernels.triton.tables import check_tables

_NAMESPACE = __name__.partition(".")[0]  # a copy of this package (`save_kernels`) has operators of its own
_OPTIONS = {
    "key_mask": "Tensor?", "attn_mask": "Tensor?", "documents": "Tensor?", "scale": "float?", "softcap": "float?",
    "dropout_p": "float", "seed": "SymInt?", "window": "SymInt?",
}  # fmt: skip
"""Fields of AttentionOptions with their types in a schema, in the order in which operators take them: masks first."""
_SCHEMA = "Tensor[] tables, SymInt[] configs, bool causal, " + ", ".join(f"{t} {name}" for name, t in _OPTIONS.items())


def option_arguments(options: AttentionOptions) -> tuple[Any, ...]:
    """Return options as the operators take them, behind all other arguments."""
    return tuple(getattr(options, name) for name in _OPTIONS)


def _options(arguments: tuple[Any, ...]) -> AttentionOptions:
    return AttentionOptions(**dict(zip(_OPTIONS, arguments, strict=True)))


@torch.library.custom_op(
    f"{_NAMESPACE}::block_sparse_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_SCHEMA}) -> (Tensor, Tensor)",
)
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor], configs: list[int], causal: bool, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention over the tiles that the tables list; query, key and value as in `reference.attend`, one width.

    Args:
        tables: `Visits.tensors()` three times: for the forward pass, for dq, for dk and dv.
        configs: `LaunchConfig.numbers()` three times, in the same order.
        *arguments: See `option_arguments`.

    Returns:
        Output like `query`, and the base-2 log-sum-exp of each row, float32, (batch, num_heads, q_len), which has no
        gradient.

    Raises:
        ValueError: If a table does not fit the call.
    """
    options = _options(arguments)
    config, part = _part(tables, configs, 0, query, key)
    return within_memory(
        "forward", config, query, options,
        lambda config: launch_forward(query, key, value, part, config, causal, options),
    )  # fmt: skip


@torch.library.custom_op(
    f"{_NAMESPACE}::block_sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def block_sparse_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, tables: list[Tensor],
    configs: list[int], causal: bool, *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of query, key and value, contiguous; arguments as in the forward operator."""
    options = _options(arguments)
    config, rows = _part(tables, configs, 1, query, key)
    grad_q, delta = within_memory(
        "dq", config, query, options,
        lambda config: launch_dq(query, key, value, grad, output, lse, rows, config, causal, options),
    )  # fmt: skip
    config, cols = _part(tables, configs, 2, query, key)
    grad_k, grad_v = within_memory(
        "dkdv", config, query, options,
        lambda config: launch_dkdv(query, key, value, grad, lse, delta, cols, config, causal, options),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@block_sparse_attention.register_fake
def _(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@block_sparse_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, tables, ctx.configs, ctx.causal, key_mask, attn_mask, documents, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, key_mask, attn_mask, documents, *tables)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    query, key, value, output, lse, key_mask, attn_mask, documents, *tables = ctx.saved_tensors
    none = ([None] * len(tables), *(None,) * (2 + len(_OPTIONS)))  # a gradient per input, of the input's structure
    if grad is None:
        return None, None, None, *none
    grads = block_sparse_attention_backward(
        grad, query, key, value, output, lse, tables, ctx.configs, ctx.causal, key_mask, attn_mask, documents,
        *ctx.rest,
    )  # fmt: skip
    return *grads, *none


block_sparse_attention.register_autograd(_backward, setup_context=_save)


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Refuse tensors that carry tangents: the operators would drop them in silence.

    Raises:
        NotImplementedError: If any does, as in `torch.func.jvp`.
    """
    # A tracer follows no dual tensors; outside of a dual level there are none.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "Backend 'triton' must get tensors without tangents, got forward-mode differentiation (torch.func.jvp, "
            "torch.autograd.forward_ad). Use backend='reference', which has it."
        )


def _part(
    tables: list[Tensor], configs: list[int], part: int, query: Tensor, key: Tensor
) -> tuple[LaunchConfig, list[Tensor]]:
    """Configuration and tables of forward (0), dq (1) or dkdv (2)."""
    if len(tables) != 12 or len(configs) != 15:
        raise ValueError(
            f"`tables` must have 12 entries and `configs` 15, got {len(tables)} and {len(configs)}. Use `attend.plan`."
        )
    config = LaunchConfig.of(configs[5 * part : 5 * part + 5])
    tile_q, tile_k = config.tile
    own = tables[4 * part : 4 * part + 4]
    rows, cols = -(-query.shape[2] // tile_q), -(-key.shape[2] // tile_k)
    if part == 2:
        members = heads_of_a_program(own, query, key, config)
        check_tables(own, query.shape[1] // members * cols, rows, query.device, members)
    else:
        check_tables(own, query.shape[1] * rows, cols, query.device)
    return config, own
