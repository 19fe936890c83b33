"""Attention access: how the layers of a model are reached."""

from sparse_prune.attention.access import attach, detach, find_layers, list_layers
from sparse_prune.attention.apply import apply_patterns
from sparse_prune.attention.found import FoundLayer, handle_of
from sparse_prune.attention.hf import attached_layers
from sparse_prune.attention.layer import CallShape, PrunableAttention

__all__ = [
    "CallShape",
    "FoundLayer",
    "PrunableAttention",
    "apply_patterns",
    "attach",
    "attached_layers",
    "detach",
    "find_layers",
    "handle_of",
    "list_layers",
]
