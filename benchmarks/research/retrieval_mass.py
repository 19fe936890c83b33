"""Which heads look things up, by their attention: what `sparse_prune.retrieval` by influence is measured against."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from sparse_prune.attention import attach, detach
from sparse_prune.evaluation import handles_of
from sparse_prune.evaluation.prompts import passkey_prompt

_BLOCK = 32


@torch.no_grad()
def retrieval_scores(model: Any, tokenizer: Any, length: int, prompts: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """How strongly each head looks up a hidden key: the largest attention that a row of the answer gives the needle.

    Rows and needle count by blocks of 32 tokens.

    Heads that copy from far back are few and decide about retrieval (Wu et al., arXiv:2404.15574); DuoAttention
    (arXiv:2410.10819) finds them by training gates, here the probe of block statistics sees them at once.

    Args:
        model: A causal transformers model in eval mode. Layers that were taken over are watched in the mode that they
            are in; if none was, all are taken over meanwhile.
        tokenizer: Its tokenizer.
        length: Tokens per prompt.
        prompts: How many, with keys at evenly spread depths.
        seed: Of the keys.

    Returns:
        Layer -> float64, (num_heads,), in [0, 1].

    Raises:
        ValueError: If `prompts` is not positive or the prompt does not fit `length`.
    """
    if prompts < 1:
        raise ValueError(f"`prompts` must be at least 1, got {prompts}.")
    own, digits = handles_of(model), random.Random(seed)
    handles = own or attach(model)
    before = [(handle.probe_block_size, handle.statistics) for handle in handles]
    scores = {handle.name: torch.zeros(handle.num_heads, dtype=torch.float64) for handle in handles}
    try:
        for index in range(prompts):
            key, depth = digits.randrange(10_000, 100_000), (index + 0.5) / prompts
            prompt = passkey_prompt(tokenizer, length, key, depth)
            places = sorted({place // _BLOCK for place in prompt.needle})
            # The row before a token is the one that predicts it.
            rows = sorted({(place - 1) // _BLOCK for place in prompt.answer})
            for handle in handles:
                handle.probe_block_size, handle.statistics = (_BLOCK, _BLOCK), None
            model(input_ids=torch.tensor([prompt.tokens], device=model.device), use_cache=False)
            for handle in handles:
                assert handle.statistics is not None
                largest, _ = handle.statistics.of("max")
                scores[handle.name] += largest[:, rows][:, :, places].amax((1, 2)).cpu() / prompts
    finally:
        for handle, (block_size, statistics) in zip(handles, before, strict=True):
            handle.probe_block_size, handle.statistics = block_size, statistics
        if not own:
            detach(model)
    return scores


def retrieval_heads(scores: dict[str, Tensor], share: float) -> dict[str, tuple[int, ...]]:
    """The strongest heads over all layers, as `Constraints.protected_heads` takes them.

    Args:
        scores: As `retrieval_scores` returns them.
        share: Of all heads, in [0, 1].

    Raises:
        ValueError: If `share` is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` must lie in [0, 1], got {share}.")
    ranked = sorted(((-float(s), name, head) for name, part in scores.items() for head, s in enumerate(part)))
    chosen: dict[str, list[int]] = {}
    for _, name, head in ranked[: round(share * len(ranked))]:
        chosen.setdefault(name, []).append(head)
    return {name: tuple(sorted(heads)) for name, heads in chosen.items()}
