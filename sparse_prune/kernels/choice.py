"""Which backend serves a call: what may skip blocks on a device, and what suits a pattern that still moves."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

_LARGEST_MASK = 2**24
"""Elements of a token mask, 5 bytes each, that every layer may keep for its backward pass."""


def triton_kernels() -> ModuleType | None:
    """The Triton kernels; None without the triton package."""
    try:
        from sparse_prune.kernels.triton import attend
    except ImportError:
        return None
    return attend


def triton_interprets() -> bool:
    """Whether Triton runs its kernels on a CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def skipping_backends(device: torch.device) -> tuple[str, ...]:
    """Backends that skip pruned blocks on a device, for a measurement to choose from.

    Args:
        device: Where the layer runs.
    """
    return ("triton", "flex", "gather") if device.type == "cuda" else ("gather",)


def usable_backend(backend: str) -> str:
    """The backend itself, or "gather" in the place of "triton" where there is no GPU.

    Args:
        backend: One of `BACKENDS`.
    """
    return "gather" if backend == "triton" and not torch.cuda.is_available() else backend


def check_trains(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot train on a device.

    Args:
        backend: One of `BACKENDS`.
        device: Where the layers run.

    Raises:
        ValueError: If it needs a GPU and there is none.
    """
    missing = backend == "flex" or (backend == "triton" and not triton_interprets())
    if missing and device.type != "cuda":
        raise ValueError(f"`backend={backend!r}` must train on a CUDA device, got {device}. Use 'auto' or 'gather'.")


def moving_backend(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> str:
    """The backend for a pattern that still moves: its tables must be cheap to rebuild.

    It follows from the call alone, no clock is asked: a run that is repeated or resumed takes the same.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        pattern: For the lengths of the call.
        options: Of the call.
    """
    if query.device.type == "cuda":
        kernels = triton_kernels()
        return "triton" if kernels and kernels.unsupported(query, pattern.block_size) is None else "gather"
    masked = query.device.type == "cpu" and options.softcap is None and _masking_pays(query, pattern, options)
    return "sdpa" if masked else "gather"


def _masking_pays(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> bool:
    """Whether a CPU is faster with a token mask over all pairs than with the kept blocks alone.

    Costs are in units of what SDPA takes for one query-key pair, forward and backward; `benchmarks/moving_backend.py`
    measures what they were fitted to, on one thread of an Intel Xeon.
    """
    pairs = query.shape[0] * pattern.num_heads * pattern.q_len * pattern.kv_len
    masks = (options.key_mask, options.attn_mask, options.documents)
    own = any(mask is not None and mask.shape[0] > 1 for mask in masks)  # each sample has a mask of its own
    elements = pairs if own else pairs // max(query.shape[0], 1)
    if elements > _LARGEST_MASK and not options.dropout_p:  # with dropout SDPA keeps every weight in any case
        return False
    pair, kept_pair = 1.0, 1.0 + 48 / min(pattern.block_size)
    if query.dtype == torch.bfloat16:
        kept_pair *= 1.6
    if options.dropout_p:  # gather's numbers can be drawn again, which takes longer
        pair, kept_pair = 4.0 * pair, 8.0 * kept_pair
    kept = pattern.kept_blocks / pattern.keep.numel()
    return pair * pairs + 0.55 * elements < kept_pair * kept * pairs
