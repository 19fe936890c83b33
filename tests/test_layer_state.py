"""What a checkpoint holds of a layer is small and complete."""

import io

import pytest
import torch

from sparse_prune.attention import PrunableAttention
from sparse_prune.layer_state import LayerState, StabilityTracker
from sparse_prune.scores import BlockStatistics, Score, ScoreAverage
from support.fed import HEADS, feed, pruner

BLOCKS = 24


def decide(pruner, step, reduce=None):
    feed(pruner, step, BLOCKS)
    return pruner.update(step, reduce)


@pytest.mark.parametrize("last", [2, 5])
def test_state_goes_on_where_it_was_taken_whatever_happened_since(last):
    whole, again = pruner(), pruner()
    for step in range(1, last):
        decide(whole, step)
    feed(whole, last, BLOCKS)  # probed, not decided
    state = whole.state_dict()
    reports = [whole.update(last), decide(whole, last + 1)]
    again.load_state_dict(state)
    assert [again.update(last), decide(again, last + 1)] == reports
    for name, pattern in whole.patterns.items():
        assert torch.equal(again.patterns[name].keep, pattern.keep)
    with pytest.raises(ValueError, match="version 2 or 3 or 4, got 1"):
        again.load_state_dict({**state, "version": 1})


def test_state_takes_two_numbers_per_block_that_was_seen():
    saved, filled = pruner(), io.BytesIO()
    decide(saved, 1)
    torch.save(saved.state_dict(), filled)
    seen, grid = BLOCKS * (BLOCKS + 1) // 2, BLOCKS**2
    expected = 2 * HEADS * (16 * seen + 3 * grid // 8) + 2 * 2 * 8 * grid
    assert expected <= filled.tell() < expected + 10_000


@pytest.mark.parametrize(
    ("statistic", "kinds"), [("max", ("max", "mean")), ("mean_square", ("mean_square", "mean")), ("mean", ("mean",))]
)
def test_ranks_share_only_what_a_decision_looks_at(statistic, kinds):
    shared, made = {}, pruner(statistic=statistic)
    decide(made, 1, lambda statistics: shared.update(statistics) or statistics)
    for seen in shared.values():
        assert seen.kinds == kinds
        assert seen.sums.shape == (len(kinds), HEADS, BLOCKS, BLOCKS)
        assert seen.only(kinds) is seen


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_that_is_not_finite_is_refused(bad):
    made = pruner()
    feed(made, 1, BLOCKS)
    made.layers["b"].layer.statistics.sums[2, 1, 3, 2] = bad
    with pytest.raises(ValueError, match="'b': attention logits must be finite"):
        made.update(1)


class Signed(Score):
    """A score of the forward pass that may be negative."""

    signed = True

    def add(self, tile):
        raise AssertionError("its sums are given")


def test_questions_on_shorter_texts_leave_negative_scores_beyond_them():
    score = Signed()

    def seen(sums):
        sums = torch.tensor([[sums]], dtype=torch.float64)
        return BlockStatistics(sums, torch.ones(1, 1, sums.shape[2], 1, dtype=torch.float64), (score.kind,))

    averages = ScoreAverage(score.kind, 0.0), ScoreAverage("mean", 0.0)
    state = LayerState(PrunableAttention("a", 1, 1, causal=False), *averages, StabilityTracker())
    state.scores.update(seen([[-1.0, -2.0], [-3.0, -4.0]]))
    state.average_beside("questions").update(seen([[0.5]]))
    assert state.scored(score, (8, 8)).scores.tolist() == [[[0.5, -2.0], [-3.0, -4.0]]]
