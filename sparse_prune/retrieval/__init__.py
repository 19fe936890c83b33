"""Retrieval: probes that ask for what stands far back, and the heads that a model answers them with."""

from sparse_prune.retrieval.heads import RetrievalHeads, far_field_influence, strongest_heads
from sparse_prune.retrieval.probes import RetrievalProbe, retrieval_probes
from sparse_prune.retrieval.text_probes import text_probes

__all__ = [
    "RetrievalHeads",
    "RetrievalProbe",
    "far_field_influence",
    "retrieval_probes",
    "strongest_heads",
    "text_probes",
]
