"""Which score to prune by: loss and retrieval tasks after one-shot pruning, no fine-tuning.

    python benchmarks/research/scores.py --length 1024 --block-size 16 --output benchmarks/results/scores.json

Every score is averaged over the same training documents; those that need a backward pass take it from the loss of the
text, of those tokens that need far context, or of answers to questions in the wordings for choosing. Loss and tasks are
of validation documents, in the wordings for testing. Each row is written as soon as it is there; rows that are there
are not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from one_shot import load, measure_row, measured_rows, parser, save
from torch import Tensor
from torch.nn import functional as F

from sparse_prune import BlockPattern, Constraints
from sparse_prune.attention import PrunableAttention, attach
from sparse_prune.attention.modes import evaluating
from sparse_prune.pattern import total_sparsity
from sparse_prune.precision import fast_autocast
from sparse_prune.retrieval import RetrievalProbe, look_at, look_back, repeat_passages, text_probes
from sparse_prune.retrieval.watching import watched
from sparse_prune.scores import (
    BlockStatistics,
    Influence,
    MassGradient,
    MassShare,
    Max,
    Mean,
    MeanSquare,
    OutputChange,
    Score,
    ScoreAverage,
)
from sparse_prune.selection import LayerScores, select

Scores = dict[str, Tensor]
"""Layer -> float32, (num_heads, blocks, blocks)."""
Start = Callable[[Tensor], Tensor]
"""Makes of logits, (length, vocabulary), what the backward pass starts from."""
_NEAR = 64
"""Tokens: what a token cannot know without seeing further needs far context."""
_FAR_SHARE = 0.1
"""Of the tokens: those whose loss rises most without far context."""


class Study:
    """All scores of one model.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        texts: Training documents, int64, (texts, length).
        block_size: Tokens per block side.
    """

    def __init__(self, model: Any, tokenizer: Any, texts: Tensor, block_size: int) -> None:
        self.model, self.tokenizer, self.texts, self.sides = model, tokenizer, texts, (block_size, block_size)
        self.layers, self.call = attach(model), partial(model, use_cache=False)
        model.requires_grad_(False)
        self.candidates: dict[str, Callable[[], Scores]] = {
            "Mean()": partial(self.forward, Mean(), texts),
            "MeanSquare()": partial(self.forward, MeanSquare(), texts),
            "Max()": lambda: self.in_texts,
            "MassShare()": partial(self.forward, MassShare(), texts),
            "OutputChange()": partial(self.forward, OutputChange(), texts),
            "MassGradient() of the text": partial(self.backward, MassGradient(), self.of_text),
            "Influence() on the text": partial(self.backward, Influence(), self.of_text),
            "Influence() on tokens that need far context": partial(self.backward, Influence(), self.of_far_tokens),
            "Influence() on answers": lambda: self.on_answers,
            "Max(), or Influence() on answers, by rank": self.by_rank,
            "Max(), of texts or of questions": self.with_questions,
        }

    def forward(self, score: Score, sequences: Iterable[Tensor]) -> Scores:
        """Average a score that sees no gradient over sequences."""
        own = score if score.statistic is None else None
        for layer in self.layers:
            layer.score = own
        seen = look_at(self.model, self.call, self.layers, sequences, self.sides, score.kind)
        for layer in self.layers:
            layer.score = None
        return averages(score, seen)

    def backward(self, score: Score, passes: Callable[[], Iterable[tuple[Tensor, Start]]]) -> Scores:
        """Average a score of the backward pass over sequences, each with what its backward pass starts from."""
        root = self.model.get_input_embeddings().weight
        root.requires_grad_(True)
        sequences = list(passes())
        with watched(self.layers, self.sides, score), evaluating(self.model):
            for tokens, start in sequences:
                torch.autograd.grad(start(self._logits(tokens)), root)
            return averages(score, {layer.name: layer.score_sums for layer in self.layers})

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens[None], use_cache=False).logits[0]
        return logits

    def of_text(self) -> Iterable[tuple[Tensor, Start]]:
        """The loss of the text, as in training."""
        return [(text, lambda logits, text=text: _losses(logits, text).mean()) for text in self.texts]

    def of_far_tokens(self) -> Iterable[tuple[Tensor, Start]]:
        """The loss of the tokens that lose most when attention sees no further than its neighbourhood."""
        made = []
        for text in self.texts:
            with torch.no_grad():
                rise = -_losses(self._logits(text), text)
                with near_only(self.layers, len(text), self.sides):
                    rise += _losses(self._logits(text), text)
            far = rise.topk(round(_FAR_SHARE * len(rise))).indices
            made.append((text, lambda logits, text=text, far=far: _losses(logits, text)[far].mean()))
        return made

    @cached_property
    def in_texts(self) -> Scores:
        """The largest attention that a block gets in texts."""
        return self.forward(Max(), self.texts)

    @cached_property
    def questions(self) -> list[RetrievalProbe]:
        """A probe of each text, in words."""
        return text_probes(self.tokenizer, self.texts, len(self.texts))

    def of_answers(self) -> Iterable[tuple[Tensor, Start]]:
        """How far the answers to questions lead."""
        return [(probe.tokens, lambda logits, probe=probe: -probe.lead(logits)) for probe in self.questions]

    @cached_property
    def on_answers(self) -> Scores:
        """Influence on the answers to questions."""
        return self.backward(Influence(), self.of_answers)

    def by_rank(self) -> Scores:
        """The better of two places among all blocks: by attention in texts, by influence on answers."""
        return largest(ranks(self.in_texts), ranks(self.on_answers))

    def with_questions(self) -> Scores:
        """What `AttentionPruning` does by default: attention in texts, in questions and in passages that repeat."""
        repeats = repeat_passages(self.texts, 1)
        asked = look_back(self.model, self.call, self.layers, self.questions, repeats, self.sides)
        return largest(self.in_texts, *(averages(Max(), seen) for seen, _ in asked))

    def prune(self, scores: Scores, sparsity: float, *, signed: bool) -> float:
        """Put the patterns of scores in force; the share of blocks that went."""
        length = self.texts.shape[1]
        parts = []
        for layer in self.layers:
            dense = BlockPattern.dense(layer.num_heads, length, length, self.sides, layer.causal)
            parts.append(LayerScores(layer.name, scores[layer.name], dense, layer.num_kv_heads))
        patterns, _ = select(parts, Constraints(), sparsity=sparsity, signed=signed)
        for layer, pattern in zip(self.layers, patterns, strict=True):
            layer.pattern, layer.mode = pattern, "masked"
        return total_sparsity(patterns)


def averages(score: Score, seen: Mapping[str, BlockStatistics | None]) -> Scores:
    """What a score makes of the statistics that all layers have collected."""
    found: Scores = {}
    for name, statistics in seen.items():
        assert statistics is not None
        average = ScoreAverage(score.kind, decay=1.0)
        average.update(statistics)
        found[name] = score.value(average.value())
    return found


def largest(*parts: Scores) -> Scores:
    """The largest of several scores, block by block."""
    return {name: torch.stack([part[name] for part in parts]).amax(0) for name in parts[0]}


def ranks(scores: Scores) -> Scores:
    """A block's place among the blocks of all layers that queries may see, in [0, 1]: 1 scores most."""
    seen = {name: torch.ones_like(part, dtype=torch.bool).tril() for name, part in scores.items()}
    values = torch.cat([part[seen[name]] for name, part in scores.items()])
    places = values.argsort().argsort().float() / (len(values) - 1)
    found, done = {}, 0
    for name, part in scores.items():
        count = int(seen[name].sum())
        found[name] = torch.zeros_like(part).masked_scatter(seen[name], places[done : done + count])
        done += count
    return found


@contextmanager
def near_only(layers: Sequence[PrunableAttention], length: int, sides: tuple[int, int]) -> Iterator[None]:
    """Inside, layers see their first block and `_NEAR` tokens back."""
    blocks = -(-length // sides[0])
    row, col = torch.arange(blocks)[:, None], torch.arange(blocks)
    keep = (col <= row) & ((row - col <= _NEAR // sides[0]) | (col == 0))
    for layer in layers:
        seen = keep.expand(layer.num_heads, -1, -1).contiguous()
        layer.pattern, layer.mode = BlockPattern(seen, sides, True, length, length), "masked"
    try:
        yield
    finally:
        restore(layers)


def restore(layers: Iterable[PrunableAttention]) -> None:
    """Give all connections back."""
    for layer in layers:
        layer.pattern, layer.mode = None, "dense"


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of every token but the first, nats."""
    return F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")


def main() -> None:
    """A row for the dense model, then one per score and sparsity."""
    options = parser(__doc__, probes=8, sequences=6, prompts=60, tasks=("passkey", "needle", "multi_key"))
    options.add_argument("--only", nargs="+", metavar="SCORE", help="some of the scores")
    arguments = options.parse_args()
    model, tokenizer, sequences = load(arguments)
    rows, measure = measured_rows(arguments), partial(measure_row, arguments, model, tokenizer, sequences["val"])
    study = Study(model, tokenizer, sequences["train"], arguments.block_size)
    there = {(row["score"], row["asked"]) for row in rows}
    if ("dense", 0.0) not in there:
        rows.append(measure({"score": "dense", "asked": 0.0, "sparsity": 0.0}))
        save(arguments, rows, without=("only",))
    for name in arguments.only or study.candidates:
        missing = [sparsity for sparsity in arguments.sparsities if (name, sparsity) not in there]
        scores = study.candidates[name]() if missing else {}
        for sparsity in missing:
            achieved = study.prune(scores, sparsity, signed=any(bool((part < 0).any()) for part in scores.values()))
            rows.append(measure({"score": name, "asked": sparsity, "sparsity": achieved}))
            save(arguments, rows, without=("only",))
            restore(study.layers)


if __name__ == "__main__":
    with fast_autocast("cpu"):
        main()
