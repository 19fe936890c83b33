"""The reference backend: materialises all weights and masks them by the pattern."""

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.reference import attend

BACKEND = Backend("reference", attend)
