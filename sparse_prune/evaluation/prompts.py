"""Retrieval: does a model still find what is hidden in a long text?"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Filler, needle and question after Mohtashami & Jaggi, "Landmark Attention", arXiv:2305.16300.
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_PASSKEY = (" The pass key is {key}. Remember it. {key} is the pass key. ", " What is the pass key? The pass key is")
# A fact in real text, after RULER's needle in a haystack, Hsieh et al., arXiv:2404.06654.
_NEEDLE = ("\nThe special magic number for {name} is: {key}.\n", "\nThe special magic number for {name} is:")
_NAMES = ("Lisbon", "Nairobi", "Oslo", "Quito", "Seoul", "Toronto", "Vienna", "Zagreb")


@dataclass(frozen=True)
class Prompt:
    """A long text in which a key is hidden, the question for it, and the answer."""

    tokens: list[int]
    """All of it."""
    needle: range
    """Places of the tokens that tell the key."""
    answer: range
    """Places of the tokens that repeat it: the last ones."""


def passkey_accuracy(model: Any, tokenizer: Any, length: int, prompts: int, seed: int = 0) -> float:
    """Share of prompts whose hidden five-digit key the model completes, in [0, 1].

    Needles lie at evenly spread depths; `retrieves` says what counts.

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
        prompt = passkey_prompt(tokenizer, length, digits.randrange(10_000, 100_000), (index + 0.5) / prompts)
        right += retrieves(model, prompt)
    return right / prompts


@torch.no_grad()
def retrieves(model: Any, prompt: Prompt) -> bool:
    """Whether the model puts every token of the answer first, seen in one forward pass with the true answer as input.

    Args:
        model: A transformers causal language model.
        prompt: What to answer.
    """
    inputs, answer = torch.tensor([prompt.tokens], device=model.device), len(prompt.answer)
    # Logits of a long prompt are larger than the model: ask for the last ones, where the model can be asked.
    few = {"logits_to_keep": answer + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=inputs, use_cache=False, **few).logits[0, -answer - 1 : -1]
    return bool((logits.argmax(-1) == inputs[0, -answer:]).all())


def passkey_prompt(tokenizer: Any, length: int, key: int, depth: float) -> Prompt:
    """One prompt, exactly `length` tokens with the answer.

    Args:
        tokenizer: A transformers tokenizer.
        length: Tokens.
        key: The number to hide.
        depth: Where, in [0, 1]; 0 is the start.

    Raises:
        ValueError: If needle and question alone are longer than `length`, or `depth` is out of range.
    """
    needle, question = (_encode(tokenizer, text.format(key=key)) for text in _PASSKEY)
    return _hide(_encode(tokenizer, _FILLER), needle, question, _encode(tokenizer, f" {key}"), length, depth)


def needle_prompt(tokenizer: Any, haystack: Sequence[int], length: int, key: int, depth: float) -> Prompt:
    """Like `passkey_prompt`, with a fact about a city hidden in real text.

    Args:
        tokenizer: A transformers tokenizer.
        haystack: Tokens of the text; repeated if there are too few.
        length: Tokens, answer included.
        key: The number to hide; it also chooses the city.
        depth: Where, in [0, 1]; 0 is the start.

    Raises:
        ValueError: If needle and question alone are longer than `length`, `depth` is out of range, or there is no
            haystack.
    """
    if not haystack:
        raise ValueError("`haystack` must hold tokens, got none. Give it text.")
    name = _NAMES[key % len(_NAMES)]
    needle, question = (_encode(tokenizer, text.format(key=key, name=name)) for text in _NEEDLE)
    return _hide(haystack, needle, question, _encode(tokenizer, f" {key}"), length, depth)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _hide(
    filler: Sequence[int], needle: list[int], question: list[int], answer: list[int], length: int, depth: float
) -> Prompt:
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"`depth` must lie in [0, 1], got {depth}. 0 hides at the start, 1 just before the question.")
    room = length - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(
            f"`length` must be at least {length - room} tokens for needle and question, got {length}. "
            "Raise it, or ask for no prompts."
        )
    text = (list(filler) * (room // len(filler) + 1))[:room]
    place = int(depth * room)
    tokens = text[:place] + needle + text[place:] + question + answer
    return Prompt(tokens, range(place, place + len(needle)), range(length - len(answer), length))
