"""The one entry to block-sparse attention: checks the call, then hands it to a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prune.kernels import gather, reference, sdpa
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern


def _triton(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    try:
        from sparse_prune.kernels.triton.launch import attend
    except ImportError as error:
        raise ValueError("`backend='triton'` needs the triton package. Install it, or use 'gather'.") from error
    return attend(query, key, value, pattern, options)


BACKENDS = {"gather": gather.attend, "reference": reference.attend, "sdpa": sdpa.attend, "triton": _triton}
"""Name -> implementation. 'gather' and 'triton' skip pruned blocks; 'reference' and 'sdpa' mask them."""


def skipping_backends(device: torch.device) -> tuple[str, ...]:
    """Backends that skip pruned blocks on a device, for a measurement to choose from."""
    return ("triton", "gather") if device.type == "cuda" else ("gather",)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    options: AttentionOptions | None = None,
    *,
    backend: str = "gather",
) -> Tensor:
    """Attention over the kept blocks of a pattern.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        key: (batch, num_kv_heads, kv_len, head_dim); num_kv_heads divides num_heads.
        value: (batch, num_kv_heads, kv_len, head_dim).
        pattern: The connections to keep, for exactly these lengths (see `BlockPattern.at`).
        options: Masks, scale, dropout, soft cap.
        backend: One of `BACKENDS`.

    Returns:
        (batch, num_heads, q_len, head_dim). Rows that may attend to nothing are zero.

    Raises:
        ValueError: If the backend is unknown or the shapes do not fit together; the message names which.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {sorted(BACKENDS)}, got {backend!r}.")
    options = options or AttentionOptions()
    _check(query, key, value, pattern, options)
    return BACKENDS[backend](query, key, value, pattern, options)


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            "`query`, `key` and `value` must have shape (batch, heads, length, head_dim) and `value` that of `key`, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    batch, heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or heads % key.shape[1]:
        raise ValueError(
            f"`key` must have batch {batch}, head_dim {head_dim} and a number of heads that divides {heads}, "
            f"got {tuple(key.shape)}."
        )
    if pattern.num_heads != heads:
        raise ValueError(f"`pattern` must have {heads} heads like `query`, got {pattern.num_heads}.")
    if (pattern.q_len, pattern.kv_len) != (q_len, key.shape[2]):
        raise ValueError(
            f"`pattern` must cover lengths ({q_len}, {key.shape[2]}), got ({pattern.q_len}, {pattern.kv_len}). "
            "Use `pattern.at(q_len, kv_len)`."
        )
    if options.key_mask is not None and options.key_mask.shape != (batch, key.shape[2]):
        raise ValueError(f"`key_mask` must have shape ({batch}, {key.shape[2]}), got {tuple(options.key_mask.shape)}.")
