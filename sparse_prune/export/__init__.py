"""Pruned models on disk and on the hub."""

from sparse_prune.export.card import update_card
from sparse_prune.export.formats import DuoAttention, Format, KVPress
from sparse_prune.export.hub_kernels import save_kernels
from sparse_prune.export.layer_types import with_layer_types
from sparse_prune.export.loading import export_header, load
from sparse_prune.export.model import check_folder, push_to_hub, save_pretrained
from sparse_prune.export.patterns import PATTERN_FILE, load_patterns, read_pattern_file, save_patterns
from sparse_prune.export.provenance import describe_pruning

__all__ = [
    "PATTERN_FILE",
    "DuoAttention",
    "Format",
    "KVPress",
    "check_folder",
    "describe_pruning",
    "export_header",
    "load",
    "load_patterns",
    "push_to_hub",
    "read_pattern_file",
    "save_kernels",
    "save_patterns",
    "save_pretrained",
    "update_card",
    "with_layer_types",
]
