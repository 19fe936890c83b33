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


@pytest.mark.parametrize("label", ["['a']", "('a', 'b')", "{'a': 1}", "[1, 2]", '["a", null]'])
def test_what_looks_like_a_list_is_refused(label):
    with pytest.raises(ValueError, match=r"one label a row, got .* in row 2, which looks like a list"):
        numbered(["a", label], "data")
    assert numbered(["[MASK]", "(a)"], "data")[0] == ["(a)", "[MASK]"]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["POS", "neg", "pos"], "'POS' and 'pos'"),
        (["1", "2", "1.0", "01"], "'01' and '1' and '1.0'"),
        (["caf\u00e9", "cafe\u0301", "x"], "'cafe\u0301' and 'caf\u00e9'"),
        (["new york", "new  york"], "'new  york' and 'new york'"),
        (["x", "x\u200b"], "'x' and 'x\\u200b'"),
    ],
)
def test_classes_that_are_written_otherwise_alone_are_said(caplog, labels, told):
    assert len(numbered(labels, "data")[0]) == len(labels)
    assert f"differ by their writing alone stay apart: {told}." in caplog.text
    caplog.clear()
    numbered(["1", "2", "10", "nan", "a b", "ab"], "data")
    assert not caplog.records
