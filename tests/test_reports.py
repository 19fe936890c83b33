"""The pieces of reports."""

import pytest

from sparse_prune.reports import duration, factor, table


def test_a_table_aligns_columns_and_leaves_cells_empty():
    assert table(("name", "tokens:"), [("short", 8), ("", 0), ("none", "")]).splitlines() == [
        "| name | tokens |",
        "| --- | ---: |",
        "| short | 8 |",
        "| | 0 |",
        "| none | |",
    ]


@pytest.mark.parametrize(("ratio", "told"), [(1.25, "1.25x smaller"), (1, "1.00x smaller"), (0.5, "2.00x larger")])
def test_a_ratio_is_told_in_the_direction_that_it_has(ratio, told):
    assert factor(ratio, "smaller", "larger") == told


@pytest.mark.parametrize(("seconds", "told"), [(12.84, "12.8 s"), (1, "1 s"), (0.0351, "35.1 ms")])
def test_steps_are_timed_in_seconds_or_milliseconds(seconds, told):
    assert duration(seconds) == told
