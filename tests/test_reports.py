"""The pieces of reports."""

from sparse_prune.reports import table


def test_a_table_aligns_columns_and_leaves_cells_empty():
    assert table(("name", "tokens:"), [("short", 8), ("", 0), ("none", "")]).splitlines() == [
        "| name | tokens |",
        "| --- | ---: |",
        "| short | 8 |",
        "| | 0 |",
        "| none | |",
    ]
