"""Gathered blocks in torch: skips pruned blocks on every device."""

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.gather import attend

BACKEND = Backend("gather", attend, skips_on=("cpu", "cuda"), rank=30)
