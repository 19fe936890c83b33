"""What is derived from a pattern or a mask is made once, and goes when that goes."""

import gc
import weakref

import torch

from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.kernels.derived import at_lengths, derived, of_tensor


def test_it_is_made_once_per_pattern_and_key():
    one, other, made = random_pattern(2, 64, 16, density=0.5), random_pattern(2, 64, 16, density=0.5), []

    def ask(pattern, key):
        return derived(pattern, (key,), lambda: made.append(key) or [key])

    assert ask(one, "a") is ask(one, "a")
    assert ask(one, "b") == ["b"]
    assert ask(other, "a") is not ask(one, "a")
    assert made == ["a", "b", "a"]


def test_only_the_latest_state_is_kept():
    pattern, made, now = random_pattern(2, 64, 16, density=0.5), [], 1

    def ask(make):
        return derived(pattern, ("tensor",), make, lambda: now)

    first = weakref.ref(ask(lambda: torch.ones(1)))
    assert ask(lambda: made.append(1)) is first()
    now = 2
    assert ask(lambda: torch.zeros(1)) == 0
    gc.collect()
    assert first() is None
    assert not made


def test_it_is_of_the_state_that_making_it_leaves():
    pattern, states = random_pattern(2, 64, 16, density=0.5), [0]

    def make():
        states.append(states[-1] + 1)
        return len(states)

    assert derived(pattern, ("read",), make, lambda: states[-1]) == 2
    assert derived(pattern, ("read",), make, lambda: states[-1]) == 2


def test_it_lives_as_long_as_the_pattern():
    pattern = random_pattern(2, 64, 16, density=0.5)
    found = weakref.ref(derived(pattern, ("tensor",), lambda: torch.ones(3)))
    gc.collect()
    assert found() is not None
    del pattern
    gc.collect()
    assert found() is None


def test_training_can_use_what_validation_made():
    pattern = random_pattern(2, 64, 16, density=0.5)
    with torch.inference_mode():
        made = derived(pattern, ("tensor",), lambda: torch.ones(3))
    assert not made.is_inference()


def test_a_pattern_at_other_lengths_is_made_once_and_only_the_latest_are_kept():
    pattern = random_pattern(2, 64, 16, density=0.5)
    assert at_lengths(pattern, 64, 64) is pattern
    found = weakref.ref(at_lengths(pattern, 40, 40))
    assert at_lengths(pattern, 40, 40) is found()
    assert found().equals(pattern.at(40, 40))
    for length in range(41, 49):
        at_lengths(pattern, length, length)
    gc.collect()
    assert found() is None


def test_what_is_kept_at_other_lengths_does_not_keep_the_pattern():
    pattern = random_pattern(2, 64, 16, density=0.5)
    at_lengths(pattern, 64, 64)
    longer, itself = at_lengths(pattern, 96, 96), weakref.ref(pattern)
    del pattern
    gc.collect()
    assert itself() is None
    assert longer.q_len == 96


def test_what_a_mask_gives_is_made_once_per_key_and_anew_after_a_write():
    mask, made = torch.ones(3), []

    def ask(key):
        return of_tensor(mask, key, lambda: made.append(key) or mask.sum())

    assert ask("sum") is ask("sum")
    mask[0] = 5.0
    assert ask("sum") == 7.0
    assert ask("other") == 7.0
    assert made == ["sum", "sum", "other"]


def test_what_a_mask_gives_goes_with_the_mask():
    mask = torch.ones(3)
    found = weakref.ref(of_tensor(mask, "tensor", lambda: torch.ones(1)))
    gc.collect()
    assert found() is not None
    del mask
    gc.collect()
    assert found() is None


def test_inference_mode_which_counts_no_writes_keeps_nothing_of_a_mask():
    with torch.inference_mode():
        mask = torch.ones(3)
        assert of_tensor(mask, "sum", mask.sum) == 3.0
        mask[0] = 5.0
        assert of_tensor(mask, "sum", mask.sum) == 7.0
