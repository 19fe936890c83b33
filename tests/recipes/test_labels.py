"""Labels as users write them."""

import pytest

from sparse_prune.recipes.base.labels import numbered


def test_blanks_around_a_label_are_no_part_of_it():
    assert numbered(["pos", " pos", "neg ", "pos\t"], "data") == (["neg", "pos"], [1, 1, 0, 1])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 0], ["0", "2", "10"]),
        (["10.0", "2.0"], ["2.0", "10.0"]),
        ([True, False], ["False", "True"]),
        (["b", "10", "a"], ["10", "a", "b"]),
    ],
)
def test_numbers_are_ordered_by_value_and_names_as_names(labels, classes):
    assert numbered(labels, "data")[0] == classes


@pytest.mark.parametrize("missing", [None, "", "  ", float("nan")])
def test_rows_without_a_label_are_refused(missing):
    with pytest.raises(ValueError, match=r"`data` must have a label in every row, got none in 1 of 2 rows, .* row 2"):
        numbered(["a", missing], "data")


@pytest.mark.parametrize("label", ["['a']", "('a', 'b')", "{'a': 1}", "[1, 2]"])
def test_what_looks_like_a_list_is_refused(label):
    with pytest.raises(ValueError, match=r"one label a row, got .* in row 2, which looks like a list"):
        numbered(["a", label], "data")
    assert numbered(["[MASK]", "(a)"], "data")[0] == ["(a)", "[MASK]"]


def test_classes_that_differ_by_case_are_said(caplog):
    assert numbered(["POS", "neg", "pos"], "data")[0] == ["POS", "neg", "pos"]
    assert "POS and pos" in caplog.text
    assert "neg" not in caplog.text
