"""What an attention call asks for besides query, key, value and pattern."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Options of one attention call, the same for every backend.

    Raises:
        ValueError: If `dropout_p` is outside [0, 1), if dropout comes without a seed, or if `softcap` is not
            positive.
    """

    scale: float | None = None
    """Factor on query-key products; None means head_dim ** -0.5."""
    key_mask: Tensor | None = None
    """Boolean, (batch, kv_len), True = a real token. None: all are."""
    attn_mask: Tensor | None = None
    """Boolean, broadcastable to (batch, num_heads, q_len, kv_len), True = may attend. None: all may."""
    dropout_p: float = 0.0
    """Probability of dropping an attention weight, in [0, 1)."""
    seed: int | None = None
    """Seed of the dropout mask; the same seed drops the same weights in every backend."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap). Positive."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"`dropout_p` must lie in [0, 1), got {self.dropout_p}.")
        if self.dropout_p and self.seed is None:
            raise ValueError("`seed` must be given with `dropout_p` above 0, got None. Draw one per call.")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"`softcap` must be positive, got {self.softcap}. Leave it out for no cap.")
