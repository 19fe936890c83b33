"""The entry points of the kernels: check a call, then pass it to a backend."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name
from types import ModuleType

import torch
from torch import Tensor

from sparse_prune.kernels.backends import BACKENDS, check_backend
from sparse_prune.kernels.backends.triton import triton_kernels
from sparse_prune.kernels.documents import spanned
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern
from sparse_prune.scores import AttentionCall, BlockStatistics, Score, probe_blocks


def probe_attention(
    query: Tensor, key: Tensor, block_size: tuple[int, int], *, causal: bool, options: AttentionOptions
) -> BlockStatistics:
    """Collect row-mass statistics of dense attention per block: by the Triton kernel on a GPU, else in torch.

    On a GPU the sums stay there and the host does not wait. Logits that are not finite give sums that are not.

    Args:
        query: (batch, num_heads, q_len, head_dim), after position encoding.
        key: (batch, num_kv_heads, kv_len, head_dim).
        block_size: Tokens per block side, (query, key).
        causal: Whether query i sees only keys up to i + kv_len - q_len.
        options: Masks, scale and soft cap.
    """
    kernels = _probe_kernels(query, block_size)
    if kernels is not None:
        statistics: BlockStatistics = kernels.probe(query, key, block_size, causal=causal, options=options)
        return statistics
    return probe_blocks(
        query,
        key,
        block_size,
        causal=causal,
        scale=options.scale,
        key_mask=options.key_mask,
        attn_mask=_hidden_but_padding(options, query, key),
        softcap=options.softcap,
    )


def probe_score(
    score: Score,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: tuple[int, int],
    *,
    causal: bool,
    options: AttentionOptions,
    gradient: Tensor | None = None,
    pattern: BlockPattern | None = None,
) -> BlockStatistics:
    """Collect the sums of a score over one call, in torch on any device, in full precision, without dropout.

    On a GPU the score's own kernel does it, if its class names one (`Score.kernel`).

    Args:
        score: Any score.
        query: (batch, num_heads, q_len, head_dim), after position encoding.
        key: (batch, num_kv_heads, kv_len, head_dim).
        value: As `key`.
        block_size: Tokens per block side, (query, key).
        causal: Whether query i sees only keys up to i + kv_len - q_len.
        options: Masks, scale and soft cap.
        gradient: Gradient of the loss in the output, (batch, num_heads, q_len, head_dim), if the score sees it.
        pattern: The connections that the layer kept in this call, at its lengths; None: all of them.

    Raises:
        ValueError: If `pattern` has other blocks or lengths, or the score uses more than its `sees` says.
    """
    kernel = vars(type(score)).get("kernel")  # a subclass may add up something else
    complete = gradient is not None or score.sees != "gradient"
    if kernel is not None and complete and _probe_kernels(query, block_size) is not None:
        launch = resolve_name(kernel)
        statistics: BlockStatistics = launch(
            query, key, value, gradient, block_size, causal=causal, options=options, pattern=pattern
        )
        return statistics
    call = AttentionCall(
        query,
        key,
        block_size,
        causal,
        value=None if score.sees == "keys" else value,
        gradient=gradient if score.sees == "gradient" else None,
        scale=options.scale,
        key_mask=options.key_mask,
        attn_mask=_hidden_but_padding(options, query, key),
        softcap=options.softcap,
        pattern=pattern,
    )
    with torch.autocast(query.device.type, enabled=False):
        return score.probe(call)


def _probe_kernels(query: Tensor, block_size: tuple[int, int]) -> ModuleType | None:
    """Return the Triton kernels, if they probe such a call on its device."""
    kernels = triton_kernels() if query.device.type == "cuda" else None
    return kernels if kernels is not None and kernels.probes(query, block_size) else None


def _hidden_but_padding(options: AttentionOptions, query: Tensor, key: Tensor) -> Tensor | None:
    """Combine masks, documents and window into one mask, without padding, which hides queries as well."""
    if options.documents is None and options.window is None:
        return options.attn_mask
    return replace(options, key_mask=None).token_mask(query.shape[2], key.shape[2], query.device)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BlockPattern,
    options: AttentionOptions | None = None,
    *,
    backend: str = "gather",
) -> Tensor:
    """Compute attention over the kept blocks of a pattern.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        key: (batch, num_kv_heads, kv_len, head_dim); num_kv_heads divides num_heads.
        value: (batch, num_kv_heads, kv_len, value_dim).
        pattern: The connections to keep, of exactly these lengths (see `BlockPattern.at`).
        options: Masks, scale, dropout, soft cap.
        backend: One of `BACKENDS`.

    Returns:
        (batch, num_heads, q_len, value_dim). Rows that may attend to nothing are zero.

    Raises:
        ValueError: If the backend is unknown or the shapes do not fit together; the message names which.
    """
    chosen = check_backend(backend)
    options = options or AttentionOptions()
    _check(query, key, value, pattern, options)
    if not query.numel() or not key.numel() or not value.numel():  # nothing to tile: the reference takes any shape
        chosen = BACKENDS["reference"]
    return chosen.attend(query, key, value, spanned(pattern, options), options)


def _check(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "`query`, `key` and `value` must have shape (batch, heads, length, head_dim), `value` with the first three "
            f"sizes of `key`, got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}. Reshape them."
        )
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            "`query`, `key` and `value` must have one dtype, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}. Cast them to that of `value`, or use torch.autocast."
        )
    batch, heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or (heads % key.shape[1] if key.shape[1] else heads):
        raise ValueError(
            f"`key` must have batch {batch}, head_dim {head_dim} and a number of heads that divides {heads}, "
            f"got {tuple(key.shape)}. Repeat or select its heads."
        )
    if pattern.num_heads != heads:
        raise ValueError(f"`pattern` must have {heads} heads like `query`, got {pattern.num_heads}. Pass that layer's.")
    if (pattern.q_len, pattern.kv_len) != (q_len, key.shape[2]):
        raise ValueError(
            f"`pattern` must cover lengths ({q_len}, {key.shape[2]}), got ({pattern.q_len}, {pattern.kv_len}). "
            "Use `pattern.at(q_len, kv_len)`."
        )
    if options.key_mask is not None and options.key_mask.shape != (batch, key.shape[2]):
        raise ValueError(
            f"`key_mask` must have shape ({batch}, {key.shape[2]}), got {tuple(options.key_mask.shape)}. Give one "
            "value per key; masks per query are for `attn_mask`."
        )
    if options.documents is not None and options.documents.shape != (batch, key.shape[2]):
        raise ValueError(
            f"`documents` must have shape ({batch}, {key.shape[2]}), got {tuple(options.documents.shape)}. Give one "
            "number per key."
        )
    if options.documents is not None and (q_len > key.shape[2] or (q_len < key.shape[2] and not pattern.causal)):
        # Queries are the last of the tokens, and have their documents.
        raise ValueError(
            f"`documents` must number all queries, got {q_len} queries and {key.shape[2]} keys in a "
            f"{'causal' if pattern.causal else 'bidirectional'} pattern. Pass `attn_mask`."
        )
    if options.window is not None and not pattern.causal:
        raise ValueError("`window` is for causal patterns, got a bidirectional one. Pass `attn_mask`.")
