"""Block-sparse attention and its backends."""

from sparse_prune.kernels.api import BACKENDS, block_sparse_attention, check_backend, probe_attention, probe_score
from sparse_prune.kernels.choice import check_trains, moving_backend, skipping_backends, usable_backend
from sparse_prune.kernels.options import AttentionOptions, documents_from_cu_seqlens

__all__ = [
    "BACKENDS",
    "AttentionOptions",
    "block_sparse_attention",
    "check_backend",
    "check_trains",
    "documents_from_cu_seqlens",
    "moving_backend",
    "probe_attention",
    "probe_score",
    "skipping_backends",
    "usable_backend",
]
