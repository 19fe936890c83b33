"""Numbers are held against the interval that is written."""

import math

import numpy as np
import pytest

from sparse_prune.ranges import check_range, check_whole


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", 0.0, 1.0),
        ("(0, 0.5]", 0.5, 0.0),
        ("[2, inf)", 2, 1),
        ("(0, inf)", 1e-9, 0.0),
        ("[0, 1]", 1.0, math.nan),
    ],
)
def test_an_end_belongs_to_the_interval_as_it_is_written(interval, inside, outside):
    check_range(interval, share=inside)
    with pytest.raises(ValueError, match="`share` must"):
        check_range(interval, share=outside)


def test_the_error_names_argument_range_value_and_remedy():
    with pytest.raises(ValueError, match=r"^`decay` must lie in \[0, 1\), got 1.5. Lower it.$"):
        check_range("[0, 1)", "Lower it.", other=0.5, decay=1.5)
    with pytest.raises(ValueError, match=r"^`patience` must be at least 1, got 0.$"):
        check_range("[1, inf)", patience=0)
    with pytest.raises(ValueError, match=r"^`std` must be above 0, got 0.$"):
        check_range("(0, inf)", std=0)


def test_whole_numbers_of_any_type_are_taken():
    assert type(check_whole("steps", np.int64(3))) is int
    for wrong in (0, 1.0, True, "1"):
        with pytest.raises(ValueError, match="^`steps` must be a whole number of at least 1, got"):
            check_whole("steps", wrong)
