"""Names, variables, words and numbers of the tasks, which the splits do not share."""

from __future__ import annotations

from random import Random

from sparse_prune.evaluation.tasks.task import Split

NAMES: dict[Split, list[str]] = {
    "choose": [
        *("Athens", "Berlin", "Bogota", "Cairo", "Delhi", "Dublin", "Geneva", "Havana"),
        *("Lima", "Madrid", "Paris", "Prague", "Rome", "Sofia", "Tokyo", "Warsaw"),
    ],
    "test": ["Lisbon", "Nairobi", "Oslo", "Quito", "Seoul", "Toronto", "Vienna", "Zagreb"],
}
VARIABLES: dict[Split, str] = {"choose": "ABCDEFGHJKLM", "test": "NPQRSTUVWXYZ"}
WORDS: dict[Split, str] = {
    "choose": "orange forest metal lamp meadow door golden letter horse tower summer sugar",
    "test": "apple river stone candle garden window silver paper monkey bridge winter salt",
}


def number(random: Random, split: Split) -> str:
    """Draw five digits; their sum is odd in the split for choosing and even in that for tests."""
    while True:
        digits = str(random.randrange(10_000, 100_000))
        if sum(map(int, digits)) % 2 == (split == "choose"):
            return digits
