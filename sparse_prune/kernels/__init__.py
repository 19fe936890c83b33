"""Block-sparse attention and its backends."""

from sparse_prune.kernels.api import block_sparse_attention, probe_attention, probe_score
from sparse_prune.kernels.backend import Backend, name_pattern
from sparse_prune.kernels.backends import (
    BACKENDS,
    check_backend,
    check_trains,
    moving_backend,
    skipping_backends,
    usable_backend,
)
from sparse_prune.kernels.documents import documents_from_cu_seqlens
from sparse_prune.kernels.options import AttentionOptions

__all__ = [
    "BACKENDS",
    "AttentionOptions",
    "Backend",
    "block_sparse_attention",
    "check_backend",
    "check_trains",
    "documents_from_cu_seqlens",
    "moving_backend",
    "name_pattern",
    "probe_attention",
    "probe_score",
    "skipping_backends",
    "usable_backend",
]
