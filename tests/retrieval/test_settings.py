"""Settings of retrieval are checked, and the former name still makes them."""

import pytest

from sparse_prune.retrieval import Retrieval, RetrievalHeads


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"heads": -0.1}, r"`heads` must lie in \[0, 1\]"), ({"heads": 15}, "`heads` must lie in")]
    + [({"probes": 1}, "`probes` must be at least 2"), ({"length": 64}, "`length` must be at least 128 tokens")],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Retrieval(**setting)


def test_the_former_name_makes_the_same_settings():
    with pytest.warns(DeprecationWarning, match="Use Retrieval"):
        assert RetrievalHeads(share=0.2) == Retrieval(heads=0.2, probes=4)
