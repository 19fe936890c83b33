"""The last lines of a run, from the report's own numbers."""

import pytest

from sparse_prune.evaluation import CacheCost
from sparse_prune.recipes.base.closing import won_and_lost
from sparse_prune.recipes.base.history import StepRecord
from sparse_prune.recipes.base.report import CacheComparison, DenseRun, RunReport


def steps(seconds, phase):
    return [StepRecord(step, 1.0, seconds, phase, False, 0.0) for step in (1, 2, 3)]


def report(loss, seconds, found, dense=True, kv=20):
    twin = DenseRun(3.0, 2.0, steps(9.0, "dense"), {"passkey accuracy": 0.5})
    cache = CacheComparison(2048, CacheCost(90 * 2**20, 1.0, 1.0), CacheCost(kv * 2**20, 1.0, 1.0))
    return RunReport(
        {},
        loss,
        0.7,
        [],
        steps(seconds, "sparse"),
        [],
        {},
        {},
        {"passkey accuracy": found},
        twin if dense else None,
        cache,
    )


@pytest.mark.parametrize(
    ("arguments", "won", "lost"),
    [
        (
            (2.1, 6.0, 0.25),
            "a step with swapped layers is 1.50x faster (6 s against 9 s); "
            "the KV cache of 2048 tokens is 4.50x smaller (20 against 90 MiB).",
            "Lost: held-out loss +5.00% (2.1000 against 2.0000); passkey accuracy 25.0% against 50.0%.",
        ),
        (
            (1.9, 18.0, 0.5, True, 90),
            "held-out loss -5.00% (1.9000 against 2.0000).",
            "Lost: a step with swapped layers is 2.00x slower (18 s against 9 s).",
        ),
        ((2.1, 18.0, 0.25, True, 90), "nothing.", "Lost: a step with swapped layers is 2.00x slower"),
        (
            (2.1, 6.0, 0.5, False),
            "the KV cache of 2048 tokens is 4.50x smaller (20 against 90 MiB).",
            "Lost: loss and speed were not compared, which --compare_dense true does.",
        ),
    ],
)
def test_what_was_won_and_lost_stands_in_two_sentences(arguments, won, lost):
    first, second = won_and_lost(report(*arguments))
    assert first == f"Won, with 70.0% of the attention blocks pruned: {won}"
    assert second.startswith(lost)


def test_a_cache_that_grew_is_said_to_be_larger():
    grown = report(2.1, 6.0, 0.5, kv=180)
    assert grown.cache.verdict().startswith("The KV cache of 2048 tokens takes 180.0 MiB")
    assert "without patterns 90.0 MiB (2.00x larger)" in grown.cache.verdict()
    assert "the KV cache of 2048 tokens is 2.00x larger (180 against 90 MiB)" in won_and_lost(grown)[1]
