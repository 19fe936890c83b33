"""Access to the attention layers of a model."""

from sparse_prune.attention.access import attach, detach, find_layers, list_layers
from sparse_prune.attention.apply import apply_patterns
from sparse_prune.attention.handles import FoundLayer, handle_of
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
