"""Passkey retrieval: does a model still find a number hidden in a long text?"""

from __future__ import annotations

import random
from typing import Any

import torch

# Filler, needle and question after Mohtashami & Jaggi, "Landmark Attention", arXiv:2305.16300.
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = " What is the pass key? The pass key is"


@torch.no_grad()
def passkey_accuracy(model: Any, tokenizer: Any, length: int, prompts: int, seed: int = 0) -> float:
    """Share of prompts whose hidden five-digit key the model completes, in [0, 1].

    The model must put every token of the key first, seen in one forward pass with the true key as input.
    Needles lie at evenly spread depths.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        length: Tokens per prompt, answer included.
        prompts: How many; at least 1.
        seed: Of the keys.

    Raises:
        ValueError: If the prompt does not fit `length`, or `prompts` is not positive.
    """
    if prompts < 1:
        raise ValueError(f"`prompts` must be at least 1, got {prompts}.")
    digits = random.Random(seed)
    right = 0
    for index in range(prompts):
        tokens, answer = passkey_prompt(tokenizer, length, digits.randrange(10_000, 100_000), (index + 0.5) / prompts)
        inputs = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=inputs, use_cache=False).logits[0, -answer - 1 : -1]
        right += int((logits.argmax(-1) == inputs[0, -answer:]).all())
    return right / prompts


def passkey_prompt(tokenizer: Any, length: int, key: int, depth: float) -> tuple[list[int], int]:
    """Tokens of one prompt, exactly `length` with the answer, and how many of them are the answer.

    Args:
        tokenizer: A transformers tokenizer.
        length: Tokens.
        key: The number to hide.
        depth: Where, in [0, 1]; 0 is the start.

    Raises:
        ValueError: If needle and question alone are longer than `length`.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    needle, question, answer = encode(_NEEDLE.format(key=key)), encode(_QUESTION), encode(f" {key}")
    room = length - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"`length` must be at least {length - room} tokens for needle and question, got {length}.")
    unit = encode(_FILLER)
    filler = (unit * (room // len(unit) + 1))[:room]
    place = int(depth * room)
    return filler[:place] + needle + filler[place:] + question + answer, len(answer)
