"""Block-sparse attention and its backends."""

from sparse_prune.kernels.api import BACKENDS, block_sparse_attention, skipping_backends
from sparse_prune.kernels.options import AttentionOptions

__all__ = ["BACKENDS", "AttentionOptions", "block_sparse_attention", "skipping_backends"]
