"""The options of an attention call: everything but query, key, value and pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Options of one attention call, the same for every backend.

    Raises:
        TypeError: If `key_mask` or `attn_mask` is not boolean, or `documents` not of integers: a kernel reads bytes.
        ValueError: If `dropout_p` is outside [0, 1), if dropout comes without a seed, or if `softcap` or `window` is
            not positive.
    """

    scale: float | None = None
    """Factor on query-key products; None means head_dim ** -0.5."""
    key_mask: Tensor | None = None
    """Boolean, (batch, kv_len), True = a real token. None: all are."""
    attn_mask: Tensor | None = None
    """Boolean, broadcastable to (batch, num_heads, q_len, kv_len), True = may attend. None: all may."""
    documents: Tensor | None = None
    """Integers, (batch, kv_len): tokens of packed sequences see only tokens with their own number. None: all."""
    window: int | None = None
    """A query sees only the latest `window` keys up to its own position. Causal patterns only. None: all."""
    dropout_p: float = 0.0
    """Probability of dropping an attention weight, in [0, 1)."""
    seed: int | None = None
    """Seed of the dropout mask; the same seed drops the same weights in every backend."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap). Positive."""

    def __post_init__(self) -> None:
        for name, mask in (("key_mask", self.key_mask), ("attn_mask", self.attn_mask)):
            if mask is not None and mask.dtype != torch.bool:
                raise TypeError(
                    f"`{name}` must be boolean, True = may be attended to, got {mask.dtype}. "
                    "Pass `mask.bool()` if it holds ones and zeros, `mask == 0` if it is added to the logits."
                )
        if self.documents is not None and (self.documents.is_floating_point() or self.documents.dtype == torch.bool):
            raise TypeError(f"`documents` must hold integers, got {self.documents.dtype}. Pass `documents.int()`.")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"`dropout_p` must lie in [0, 1), got {self.dropout_p}. Write 0.1 for 10 %.")
        if self.dropout_p and self.seed is None:
            raise ValueError("`seed` must be given with `dropout_p` above 0, got None. Draw one per call.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"`softcap` must be positive, got {self.softcap}. Leave it out for no cap.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"`window` must be at least 1 token, got {self.window}. Leave it out for no window.")

    def with_masks(self, change: Callable[[Tensor], Tensor]) -> AttentionOptions:
        """Return the same options with changed masks.

        Args:
            change: Returns a tensor of the same shape for each of `key_mask`, `attn_mask` and `documents`.
        """

        def changed(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else change(mask)

        key_mask, attn_mask, documents = changed(self.key_mask), changed(self.attn_mask), changed(self.documents)
        return replace(self, key_mask=key_mask, attn_mask=attn_mask, documents=documents)

    def token_mask(self, q_len: int, kv_len: int, device: torch.device) -> Tensor | None:
        """Combine all masks into a boolean one, broadcastable to (batch, num_heads, q_len, kv_len); None without any.

        The queries are the last `q_len` of the `kv_len` positions.
        """
        parts = []
        if self.key_mask is not None:
            parts.append(self.key_mask[:, None, None, :])
        if self.attn_mask is not None:
            parts.append(self.attn_mask)
        if self.documents is not None:
            own = self.documents[:, kv_len - q_len :]
            parts.append((own[:, :, None] == self.documents[:, None, :])[:, None])
        if self.window is not None:
            position = torch.arange(kv_len, device=device)
            parts.append((position > position[kv_len - q_len :, None] - self.window)[None, None])
        mask = None
        for part in parts:
            mask = part if mask is None else mask & part
        return mask
