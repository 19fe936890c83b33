"""Files in which other programs keep which heads are full."""

from sparse_prune.export.formats.duo_attention import DuoAttention
from sparse_prune.export.formats.format import Format
from sparse_prune.export.formats.kvpress import KVPress

__all__ = ["DuoAttention", "Format", "KVPress"]
