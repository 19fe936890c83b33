"""Attention access: how the layers of a model are reached."""

from sparse_prune.attention.hf import attach, attached_layers, detach, find_layers, handle_of
from sparse_prune.attention.layer import CallShape, PrunableAttention

__all__ = ["CallShape", "PrunableAttention", "attach", "attached_layers", "detach", "find_layers", "handle_of"]
