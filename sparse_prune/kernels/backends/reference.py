"""The reference: every weight materialised, masked by the pattern."""

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.reference import attend

BACKEND = Backend("reference", attend)
