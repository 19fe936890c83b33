"""SDPA with the pattern as a boolean mask: exact on every device, skips nothing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Shapes as in `reference.attend`. Dropout draws from torch's generator; `seed` does not apply.

    Raises:
        ValueError: If a soft cap is asked for, which SDPA has not.
    """
    if options.softcap is not None:
        raise ValueError("Backend 'sdpa' has no `softcap`. Use 'reference', which has.")
    group = query.shape[1] // key.shape[1]
    mask = pattern.token_mask(query.shape[2], key.shape[2], query.device)[None]
    visible = options.token_mask(query.shape[2], key.shape[2], query.device)
    if visible is not None:
        mask = mask & visible
    output: Tensor = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(group, 1),
        value.repeat_interleave(group, 1),
        attn_mask=mask,
        dropout_p=options.dropout_p,
        scale=options.scale,
    )
    return output.masked_fill(~mask.any(-1, keepdim=True), 0.0)
