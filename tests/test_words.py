"""Numbers and lists in words."""

import pytest

from sparse_prune.words import duration, factor, some


@pytest.mark.parametrize(
    ("ratio", "told"), [(1.25, "1.25x smaller"), (1, "1.00x smaller"), (0.5, "2.00x larger"), (0, "0.00x smaller")]
)
def test_a_ratio_is_told_in_the_direction_that_it_has(ratio, told):
    assert factor(ratio, "smaller", "larger") == told


@pytest.mark.parametrize(("seconds", "told"), [(12.84, "12.8 s"), (1, "1 s"), (0.0351, "35.1 ms")])
def test_steps_are_timed_in_seconds_or_milliseconds(seconds, told):
    assert duration(seconds) == told


def test_a_long_list_tells_how_many_it_leaves_out():
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c"], most=1) == "a and 2 more"
    assert some(["a", "b", "c", "d"], comma="; ") == "a; b; c and 1 more"
