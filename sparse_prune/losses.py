"""Which of the logged keys are losses: modules name them as they like, within a rule."""

from __future__ import annotations

from collections.abc import Container

TWIN = "dense/"
"""What keys begin with under which a pruned run holds what its dense twin logged."""
_WORDS = {"training": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test",)}
_ENDINGS = {
    "training": ("", "_step", "_epoch"),
    "validation": ("", "_epoch", "_step"),
    "test": ("", "_epoch", "_step"),
}


def loss_keys(stage: str) -> tuple[str, ...]:
    """The names that a stage's loss may have, the ones that are looked for first in front.

    They are `train/loss` and `train_loss` with train or training, val, valid or validation, test; each also with the
    ending _step or _epoch, which Lightning adds to what is logged for both; and for training a bare `loss`.

    Args:
        stage: "training", "validation" or "test".
    """
    names = [f"{word}{mark}loss" for word in _WORDS[stage] for mark in "/_"]
    names += ["loss"] if stage == "training" else []
    return tuple(name + ending for name in names for ending in _ENDINGS[stage])


def find_loss(stage: str, logged: Container[str]) -> str | None:
    """The key of a stage's loss among those that a run logged, the first of `loss_keys` that is one; None without any.

    Args:
        stage: As for `loss_keys`.
        logged: Keys of a run.
    """
    return next((key for key in loss_keys(stage) if key in logged), None)
