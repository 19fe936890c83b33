"""Retrieval: questions on what stands far back, and what a model looks at to answer them."""

from sparse_prune.retrieval.asked_model import AskedModel
from sparse_prune.retrieval.heads import far_field_influence, strongest_heads
from sparse_prune.retrieval.probes import RetrievalProbe, retrieval_probes
from sparse_prune.retrieval.questions import Questions
from sparse_prune.retrieval.repeats import repeat_passages
from sparse_prune.retrieval.settings import Retrieval, RetrievalHeads
from sparse_prune.retrieval.text_probes import text_probes
from sparse_prune.retrieval.watching import look_at, look_back

__all__ = [
    "AskedModel",
    "Questions",
    "Retrieval",
    "RetrievalHeads",
    "RetrievalProbe",
    "far_field_influence",
    "look_at",
    "look_back",
    "repeat_passages",
    "retrieval_probes",
    "strongest_heads",
    "text_probes",
]
