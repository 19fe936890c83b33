"""The logged keys that are losses: modules may name them in several usual ways."""

from __future__ import annotations

from collections.abc import Container

TWIN = "dense/"
"""Prefix of the keys under which a pruned run logs the metrics of its dense twin."""
_WORDS = {"training": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test",)}
_ENDINGS = {
    "training": ("", "_step", "_epoch"),
    "validation": ("", "_epoch", "_step"),
    "test": ("", "_epoch", "_step"),
}


def loss_keys(stage: str) -> tuple[str, ...]:
    """Return the keys that a stage's loss may have, the preferred ones first.

    They are `train/loss` and `train_loss` with train or training, val, valid or validation, test; each also with the
    ending _step or _epoch, which Lightning adds to values that are logged for both; and a bare `loss` for training.

    Args:
        stage: "training", "validation" or "test".
    """
    names = [f"{word}{mark}loss" for word in _WORDS[stage] for mark in "/_"]
    names += ["loss"] if stage == "training" else []
    return tuple(name + ending for name in names for ending in _ENDINGS[stage])


def find_loss(stage: str, logged: Container[str]) -> str | None:
    """Return the first of `loss_keys` that a run logged; None if it logged none."""
    return next((key for key in loss_keys(stage) if key in logged), None)
