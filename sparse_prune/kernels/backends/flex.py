"""The FlexAttention backend: it skips pruned blocks and has gradients on a GPU only."""

from __future__ import annotations

from torch import Tensor

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern


def _attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    from sparse_prune.kernels.flex import attend  # takes a second to import

    return attend(query, key, value, pattern, options)


BACKEND = Backend("flex", _attend, skips_on=("cuda",), rank=20, trains=lambda device: device.type == "cuda")
