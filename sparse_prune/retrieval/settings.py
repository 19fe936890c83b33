"""Settings: what is asked of a language model, and what its answers decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import deprecated

from sparse_prune.ranges import check_range
from sparse_prune.retrieval.probes import LEAST_LENGTH


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Questions to a causal language model in its first decisions, and what its answers decide.

    What the model looks at while it reads and answers them scores blocks as training does: a block has the largest of
    the scores. A share of the heads, those that the answers hang on most, can be kept whole beside that.

    Raises:
        ValueError: If a number is out of range.
    """

    probes: int = 8
    """Texts to ask about, at least 2: those of the training steps before a decision, until all ranks had enough. Each
    gives a sequence that asks for what stands in it, in words (`text_probes`) up to eight times, and one that repeats
    passages: two forward passes. If `heads` is not 0, the first decision asks as many times more, with a backward
    pass."""
    heads: float = 0.0
    """Share of all heads to keep whole, in [0, 1]."""
    length: int | None = None
    """Tokens per sequence, at most; None: those of a training sequence."""
    seed: int = 0
    """Of the questions and the repeated passages."""
    module: str | None = None
    """Qualified name, in the LightningModule, of the module that takes tokens and ends with logits; None: the child
    that holds all attention layers."""

    def __post_init__(self) -> None:
        check_range("[0, 1]", "0.05 keeps 5 % of the heads whole.", heads=self.heads)
        check_range("[2, inf)", "One of each kind.", probes=self.probes)
        if self.length is not None and self.length < LEAST_LENGTH:
            raise ValueError(f"`length` must be at least {LEAST_LENGTH} tokens or None, got {self.length}.")


@deprecated("Use Retrieval(heads=...), which scores blocks by its questions, too.")
def RetrievalHeads(*, share: float = 0.15, probes: int = 4, **others: Any) -> Retrieval:  # noqa: N802
    """Return the settings under their former name."""
    return Retrieval(heads=share, probes=probes, **others)
