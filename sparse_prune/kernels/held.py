"""Where a cache that evicts holds its key blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeldBlocks:
    """Says where key blocks stand in a tensor that holds those of all heads side by side."""

    place: Tensor
    """Number of each block among those held, int64, (num_kv_heads, kv_blocks), on the CPU; -1 if it was evicted."""

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads."""
        return self.place.shape[0]

    def shown(self, everything: Tensor) -> Tensor:
        """View (batch, 1, slots, dim) as (batch, num_kv_heads, slots, dim): every head sees all slots."""
        return everything.expand(-1, self.num_kv_heads, -1, -1)
