import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prune import (
    AttentionPruner,
    BlockPattern,
    ConstantSchedule,
    Constraints,
    CosineSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LayerScores,
    LinearSchedule,
    ScoreAverage,
    StabilityTracker,
    probe_blocks,
    select,
)
from sparse_prune.attention import PrunableAttention
from sparse_prune.pattern import possible_blocks, suited_block_size, whole_blocks
from sparse_prune.scores.mass_share import row_mass
from sparse_prune.selection import _solve
from support.tiny import tiny_llama

BLOCKS = st.sampled_from([(4, 4), (8, 4), (4, 8)])
RAMPS = [LinearSchedule, CosineSchedule, CubicSchedule, ExponentialSchedule]


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_is_monotone_between_its_ends(ramp):
    schedule = ramp(initial=0.1, final=0.8, begin_step=3, end_step=20)
    values = [schedule(step) for step in range(30)]
    assert values == sorted(values)
    assert values[3] == pytest.approx(0.1)
    assert values[20] == values[29] == pytest.approx(0.8)


def test_constant_schedule_jumps_at_begin_step():
    schedule = ConstantSchedule(final=0.5, begin_step=2)
    assert [schedule(step) for step in (0, 1, 2, 3)] == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"final": 0.5, "begin_step": 5, "end_step": 4}, "end_step"),
        ({"final": float("nan"), "end_step": 4}, "final"),
        ({"final": 0.1, "initial": 0.2, "end_step": 4}, "final"),
        ({"final": 0.1, "begin_step": -1, "end_step": 4}, "begin_step"),
        ({"final": 0.1, "end_step": 800.0}, "end_step"),
        ({"final": 0.1, "end_step": float("nan")}, "end_step"),
        ({"final": 0.1, "begin_step": -0.1, "end_step": 4}, "begin_step"),
        ({"final": 0.1, "begin_step": 0.5, "end_step": 0.4}, "end_step"),
        ({"final": "0.5", "end_step": 4}, "final"),
        ({"final": 0.5, "end_step": "10"}, "end_step"),
        ({"final": 0.5, "end_step": True}, "end_step"),
    ],
)
def test_bad_schedule_names_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        LinearSchedule(**arguments)


@pytest.mark.parametrize("ramp", RAMPS)
def test_shares_of_a_run_become_steps(ramp):
    schedule = ramp(final=0.8, begin_step=0.1, end_step=0.8)
    assert schedule.resolved(50) == ramp(final=0.8, begin_step=5, end_step=40)
    assert ramp(final=0.8, begin_step=3, end_step=1.0).resolved(50) == ramp(final=0.8, begin_step=3, end_step=50)
    steps = ramp(final=0.8, begin_step=1, end_step=1)
    assert steps.resolved(50) is steps  # 1 is a step, 1.0 the whole run
    with pytest.raises(ValueError, match="must not come before `begin_step`, got 0.1 and 30: steps 5 and 30 of 50"):
        ramp(final=0.8, begin_step=30, end_step=0.1).resolved(50)
    with pytest.raises(ValueError, match="`total_steps` must be at least 1, got 0"):
        schedule.resolved(0)


def test_a_share_of_a_run_has_no_value_before_the_length_is_known():
    assert ConstantSchedule(final=0.5, begin_step=0.4).resolved(5) == ConstantSchedule(final=0.5, begin_step=2)
    with pytest.raises(ValueError, match=r"optimizer steps, got 0 and 0\.8.*resolved\(total_steps\)"):
        CubicSchedule(final=0.4, end_step=0.8)(1)


@given(st.integers(1, 30), st.integers(0, 20), BLOCKS, st.booleans())
def test_possible_blocks_hold_visible_tokens_and_whole_ones_no_others(q_len, extra, block, causal):
    kv_len = q_len + extra
    possible = possible_blocks(q_len, kv_len, block, causal)
    visible = torch.zeros_like(possible, dtype=torch.int64)
    for i, j in itertools.product(range(q_len), range(kv_len)):
        if not causal or j <= i + extra:
            visible[i // block[0], j // block[1]] += 1
    assert torch.equal(possible, visible > 0)
    rows = (q_len - torch.arange(len(possible)) * block[0]).clamp(max=block[0])
    assert torch.equal(whole_blocks(q_len, kv_len, block, causal), visible == rows[:, None] * block[1])


@given(st.integers(1, 40), BLOCKS, st.integers(0, 2**31))
def test_token_mask_of_last_queries_is_the_end_of_the_whole_mask(length, block, seed):
    dense = BlockPattern.dense(2, length, length, block, True)
    keep = torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    pattern = BlockPattern(keep, block, True, length, length)
    whole = pattern.token_mask(length, length)
    for i, j in itertools.product(range(length), range(length)):
        expected = keep[:, i // block[0], j // block[1]] & (j <= i)
        assert torch.equal(whole[:, i, j], expected)
    assert torch.equal(pattern.token_mask(1, length), whole[:, -1:])


def test_longer_pattern_keeps_sinks_band_and_dense_heads():
    rows, cols = torch.arange(6)[:, None], torch.arange(6)
    band = (cols <= rows) & ((cols < 1) | (rows - cols < 2))
    pattern = BlockPattern(torch.stack([band, cols <= rows]), (4, 4), True, 24, 24)
    rows, cols = torch.arange(9)[:, None], torch.arange(9)
    longer = pattern.at(36, 36)
    assert torch.equal(longer.keep[0], (cols <= rows) & ((cols < 1) | (rows - cols < 2)))
    assert torch.equal(longer.keep[1], cols <= rows)
    assert torch.equal(longer.at(24, 24).keep, pattern.keep)
    assert torch.equal(pattern.at(8, 24).keep, pattern.keep[:, 4:])


@given(
    st.integers(1, 40),
    st.integers(0, 90),
    st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 4)]),
    st.integers(0, 2**31),
    st.floats(0.1, 0.9),
)
@settings(deadline=None)
def test_needed_blocks_are_those_that_any_later_query_attends_to(length, now, block, seed, density):
    keep = BlockPattern.dense(3, length, length, block, True).keep
    keep = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < density
    keep[2, -1] = True  # a dense head
    pattern = BlockPattern(keep, block, True, length, length)
    far = 16 * (4 * (length + now) // 16 + 5)  # past the last reach of the band
    seen = pattern.token_mask(far, far)[:, now:].any(1)
    borders = range(0, now, block[1])
    expected = [seen[:, start : min(start + block[1], now)].any(-1) for start in borders]
    assert torch.equal(pattern.needed_after(now), torch.stack(expected, 1) if expected else torch.zeros(3, 0) > 0)


@given(st.integers(1, 40), st.integers(0, 60), st.sampled_from([(4, 4), (8, 4), (4, 8)]), st.integers(0, 2**31))
@settings(deadline=None)
def test_rows_do_not_depend_on_where_the_sequence_ends(length, extra, block, seed):
    keep = BlockPattern.dense(2, length, length, block, True).keep
    keep = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    pattern, end = BlockPattern(keep, block, True, length, length), length + extra
    assert torch.equal(pattern.token_mask(end + 11, end + 11)[:, :end, :end], pattern.token_mask(end, end))


def test_needed_blocks_want_causal_self_attention():
    with pytest.raises(ValueError, match="causal"):
        BlockPattern.dense(1, 8, 8, 4, False).needed_after(8)
    with pytest.raises(ValueError, match="q_len=8, kv_len=12"):
        BlockPattern.dense(1, 8, 12, 4, True).needed_after(8)


def test_blocks_of_a_pattern_are_counted_once(monkeypatch):
    pattern = BlockPattern.dense(2, 16, 16, 4, True)
    assert (pattern.kept_blocks, pattern.possible_count, pattern.sparsity) == (20, 20, 0.0)
    for method in ("count_nonzero", "sum"):
        monkeypatch.setattr(torch.Tensor, method, None)
    assert (pattern.kept_blocks, pattern.possible_count, pattern.sparsity) == (20, 20, 0.0)


def test_bad_patterns_are_refused():
    with pytest.raises(TypeError, match="`keep`"):
        BlockPattern(torch.ones(1, 2, 2), (4, 4), True, 8, 8)
    with pytest.raises(ValueError, match="`keep`"):
        BlockPattern(torch.ones(1, 2, 3, dtype=torch.bool), (4, 4), True, 8, 8)
    with pytest.raises(ValueError, match="block_size"):
        BlockPattern.dense(1, 8, 8, (4, 6), True)


@given(st.integers(1, 25), BLOCKS, st.booleans())
@settings(deadline=None)
def test_probe_equals_pooled_softmax(length, block, causal):
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 4, length, 8, generator=generator)
    key = torch.randn(2, 2, length, 8, generator=generator)
    statistics = probe_blocks(query, key, block, causal=causal)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    if causal:
        logits = logits.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    weights = logits.softmax(-1)
    for i, j in itertools.product(*(range(n) for n in statistics.sums.shape[2:])):
        tile = weights[:, :, i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].sum(-1)
        expected = torch.stack([tile.sum((0, 2)), tile.square().sum((0, 2)), tile.amax(2).sum(0)])
        torch.testing.assert_close(statistics.sums[:, :, i, j], expected.double(), atol=1e-5, rtol=1e-5)


def test_probe_ignores_padding():
    query, key = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    real = torch.arange(16)[None] < 10
    padded = probe_blocks(query, key, (4, 4), causal=False, key_mask=real)
    plain = probe_blocks(query[:, :, :10], key[:, :, :10], (4, 4), causal=False)
    torch.testing.assert_close(padded.sums[:, :, :3, :3], plain.sums, atol=1e-6, rtol=1e-5)
    assert torch.equal(padded.counts[:, :, :3], plain.counts)
    assert padded.sums[:, :, :, 3].abs().max() == 0


def test_rows_that_a_head_does_not_see_do_not_lower_its_scores():
    query, key = torch.randn(2, 2, 2, 8, 8)
    mask = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    mask[:, 0, 1:4] = mask[:, 1, :6] = False
    seen = probe_blocks(query, key, (4, 4), causal=False, attn_mask=mask)
    assert seen.counts[0, ..., 0].tolist() == [[2, 8], [0, 4]]
    assert seen.counts[1, ..., 0].tolist() == [[2, 2], [0, 2]]
    average = ScoreAverage("mean", 0.5)
    average.update(probe_blocks(query, key, (4, 4), causal=False, attn_mask=mask[:, :1]))
    average.update(seen)
    weights = ((query @ key.mT) * 8**-0.5).softmax(-1).unflatten(-1, (2, 4)).sum(-1)
    scores = average.value()
    torch.testing.assert_close(scores[0, 0], weights[:, 0, 0].mean(0))
    torch.testing.assert_close(scores[1, 0], weights[:, 1, 0].mean(0))
    later = (4 * weights[:, 1, 4:].sum((0, 1)) / 8 + weights[:, 1, 6:].sum((0, 1))) / 8
    torch.testing.assert_close(scores[1, 1], later)


def test_a_shorter_batch_says_nothing_of_blocks_that_it_lacks():
    query, key = torch.randn(2, 1, 1, 8, 8)
    long, short = (probe_blocks(query[:, :, :n], key[:, :, :n], (4, 4), causal=False) for n in (8, 4))
    for both in (long + short, short + long):
        total, weight = both.of("mean")
        scores, alone = total / weight, long.of("mean")[0] / 4
        torch.testing.assert_close(scores[0, :, 1], alone[0, :, 1])
        torch.testing.assert_close(scores[0, 0, 0], (alone[0, 0, 0] + 1) / 2)


@pytest.mark.parametrize(("block", "rows", "cols"), [((4, 4), 3, 3), ((8, 4), 2, 4), ((4, 8), 3, 2)])
def test_the_end_that_was_padding_in_all_samples_is_trimmed(block, rows, cols):
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, 6:] = real[1, 11:] = False
    padded = probe_blocks(*torch.randn(2, 2, 3, 20, 8), block, causal=False, key_mask=real)
    trimmed = padded.trimmed(block)
    assert trimmed.sums.shape == (3, 3, rows, cols)
    assert trimmed.counts.shape == (2, 1, rows, 1)
    torch.testing.assert_close(trimmed.sums.sum(), padded.sums.sum())
    assert not padded.counts[:, :, rows:].any()


def test_padding_does_not_hold_sparsity_down():
    """What no sample has is never seen: it was kept, and counted."""
    torch.manual_seed(0)
    layer = PrunableAttention("a", 3, 3, causal=False)
    pruner = AttentionPruner(ConstantSchedule(final=0.6), block_size=4)
    pruner._begin([layer])
    real = torch.ones(2, 64, dtype=torch.bool)
    real[:, 32:] = False
    query, key = torch.randn(2, 2, 3, 64, 8)
    layer.statistics = probe_blocks(query, key, (4, 4), causal=False, key_mask=real)
    report = pruner.update(1)
    assert (layer.pattern.q_len, layer.pattern.kv_len) == (32, 32)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    layer.statistics = probe_blocks(query, key, (4, 4), causal=False, key_mask=torch.zeros_like(real))
    assert pruner.update(2) is None
    layer.statistics = probe_blocks(query, key, (4, 4), causal=False)
    assert pruner.update(3).sparsity == pytest.approx(0.6, abs=0.01)
    assert layer.pattern.q_len == 64


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_probe_shows_logits_that_are_not_finite(bad):
    seen = probe_blocks(torch.full((1, 1, 4, 8), bad), torch.ones(1, 1, 4, 8), (4, 4), causal=True)
    assert not torch.isfinite(seen.sums).all()


def test_average_keeps_unseen_blocks_and_survives_a_round_trip():
    short = probe_blocks(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), (4, 4), causal=True)
    long = probe_blocks(torch.randn(1, 1, 12, 4), torch.randn(1, 1, 12, 4), (4, 4), causal=True)
    average = ScoreAverage("mean", 0.5)
    average.update(long)
    before = average.value()
    average.update(short)
    assert torch.equal(average.value()[:, 2], before[:, 2])
    assert not torch.equal(average.value()[:, 1], before[:, 1])
    other = ScoreAverage("mean", 0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.value(), average.value())


def _layer(name="a", seed=0, **changes):
    pattern = changes.pop("pattern", BlockPattern.dense(4, 64, 64, 4, True))
    scores = torch.rand(pattern.keep.shape, generator=torch.Generator().manual_seed(seed))
    return LayerScores(name, scores, pattern, num_kv_heads=2, **changes)


@given(st.floats(0.0, 0.75), st.integers(0, 100))
@settings(deadline=None)
def test_selection_reaches_the_requested_sparsity(sparsity, seed):
    patterns, _ = select([_layer("a", seed), _layer("b", seed + 1)], Constraints(), sparsity=sparsity)
    achieved = 1 - sum(p.kept_blocks for p in patterns) / sum(p.possible_count for p in patterns)
    assert achieved == pytest.approx(sparsity, abs=2e-3)
    for pattern in patterns:
        assert pattern.keep.diagonal(dim1=1, dim2=2).all()
        assert pattern.keep[:, :, 0].all()


def sorted_threshold(values, sparsity):
    """What `_solve` promises, by sorting everything."""
    count = int(sparsity * values.numel() + 0.5)
    ordered = values.sort().values
    gone, free = int((ordered == -torch.inf).sum()), ordered[ordered.isfinite()]
    if count == 0 or count < gone or not free.numel():
        return 0.0
    staying = free[count - gone :]
    if (staying > 0).any():
        return float(staying[staying > 0][0])
    past = float(torch.nextafter(free[-1], torch.tensor(torch.inf)))
    return max(past, torch.finfo(values.dtype).tiny)


@given(
    st.lists(st.sampled_from([-torch.inf, 0.0, 1e-42, 0.1, 0.25, 0.3, 0.7, 3.0, torch.inf]), min_size=1, max_size=60),
    st.floats(0.0, 1.0),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=300)
def test_threshold_is_what_sorting_finds_with_ties_and_what_must_stay_or_go(values, sparsity, dtype, seed):
    values = torch.tensor(values, dtype=dtype)
    drawn = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    for scores in (values, torch.where(drawn < 0.5, drawn, values)):
        assert _solve(scores.clone(), sparsity) == sorted_threshold(scores, sparsity)


def test_selection_past_the_constraints_keeps_only_what_must_stay():
    patterns, threshold = select([_layer()], Constraints(), sparsity=0.99)
    again, _ = select([_layer()], Constraints(), threshold=threshold)
    assert torch.equal(patterns[0].keep, again[0].keep)
    assert patterns[0].kept_blocks == 4 * (16 + 15)


@pytest.mark.parametrize("constraints", [Constraints(), Constraints(share_diagonals=0.0), Constraints(fill_reach=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_without_attention_go_first_and_together(constraints, dtype):
    pattern = BlockPattern.dense(4, 64, 64, 4, True)
    rows, cols = torch.arange(16)[:, None], torch.arange(16)
    outside = ((rows - cols > 5) & (cols >= 1)).expand(4, -1, -1)  # a sliding window
    scores = 0.1 + torch.rand(pattern.keep.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    layer = LayerScores("a", scores.masked_fill(outside, 0.0), pattern, num_kv_heads=2)
    zeros = float(outside[pattern.possible.expand_as(outside)].double().mean())
    assert 0.3 < zeros < 0.4
    achieved = []
    for sparsity in (0.0, 0.01, 0.2, 0.3, 0.5, 0.99):
        (found,), threshold = select([layer], constraints, sparsity=sparsity)
        achieved.append(found.sparsity)
        assert torch.equal(found.keep, select([layer], constraints, threshold=threshold)[0][0].keep)
    assert achieved[:4] == pytest.approx([0.0, zeros, zeros, zeros])
    assert achieved[4] == pytest.approx(0.5, abs=0.01)
    assert achieved[5] == pytest.approx(1 - 31 / 136)  # the diagonal and the sink


def test_a_layer_in_which_only_what_must_stay_is_attended_to_keeps_just_that():
    layer = _layer()
    layer.scores[:] = 0.0
    (pattern,), threshold = select([layer], Constraints(), sparsity=0.2)
    assert pattern.kept_blocks == 4 * (16 + 15)
    assert 0.0 < threshold < 1e-30


def test_protected_frozen_shared_and_floor():
    constraints = Constraints(protected_layers=("a",), protected_heads={"b": (3,)}, min_density=0.5)
    a, b = select([_layer("a"), _layer("b")], constraints, sparsity=0.9)[0]
    assert a.sparsity == 0
    assert b.head_sparsity[3] == 0
    assert (b.head_sparsity <= 0.5).all()
    frozen = _layer("c", pattern=b, frozen=True)
    assert torch.equal(select([frozen], Constraints(), sparsity=0.99)[0][0].keep, b.keep)
    shared = select([_layer()], Constraints(share_kv_groups=True), sparsity=0.5)[0][0]
    assert torch.equal(shared.keep[0], shared.keep[1])
    assert not torch.equal(shared.keep[1], shared.keep[2])


def test_reach_has_its_price():
    free = select([_layer()], Constraints(), sparsity=0.6)[0][0]
    priced = select([_layer()], Constraints(reach_price=3.0), sparsity=0.6)[0][0]
    rows, cols = torch.arange(16)[:, None], torch.arange(16)
    distance = (rows - cols).clamp(min=0).expand(4, -1, -1)
    inner = (cols >= 1).expand(4, 16, -1)
    assert priced.sparsity == free.sparsity
    assert distance[priced.keep & inner].float().mean() < 0.8 * distance[free.keep & inner].float().mean()
    # The price as documented: a block at the longest distance must score 1 + price times as much.
    layer = _layer()
    layer.scores[:] = 0.1
    layer.scores[0, 15, 1], layer.scores[1, 15, 1] = 0.1 * 3.7, 0.1 * 3.9  # at 14 of 15: 1 + 3 * 14 / 15 = 3.8
    keep = select([layer], Constraints(reach_price=3.0, hysteresis=0.0), threshold=0.1)[0][0].keep
    assert keep[:, 15, 1].tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="`reach_price`"):
        Constraints(reach_price=-1.0)


@pytest.mark.parametrize("block", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_shared_diagonals_share_their_largest_score(block, causal):
    layer = _layer(seed=3, pattern=BlockPattern.dense(2, 64, 64, block, causal))
    pattern = select([layer], Constraints(share_diagonals=1.0), sparsity=0.5)[0][0]
    assert 0.2 < pattern.sparsity < 0.6
    rows, cols = range(pattern.keep.shape[1]), range(1, pattern.keep.shape[2])
    seen = {}
    for row, col in itertools.product(rows, cols):
        first, last = row * block[0] // block[1], ((row + 1) * block[0] - 1) // block[1]
        if causal and col > last:
            continue
        distance = max(first - col, 0) - max(col - last, 0)
        seen.setdefault(distance, []).append((pattern.keep[:, row, col], layer.scores[:, row, col]))
    kept, dropped = [], []
    for distance, blocks in seen.items():
        keeps = torch.stack([keep for keep, _ in blocks])
        assert (keeps == keeps[0]).all()
        largest = torch.stack([score for _, score in blocks]).amax(0)
        for head in range(2):
            if distance:
                (kept if keeps[0, head] else dropped).append(float(largest[head]))
    assert min(kept) >= max(dropped)


def test_half_shared_diagonals_score_the_geometric_mean():
    layer = _layer()
    layer.scores[:] = 0.25
    layer.scores[0, 15, 5], layer.scores[0, 12, 1] = 1.0, 0.04  # one diagonal: 15 - 5 = 10 lies apart from 12 - 1 = 11
    layer.scores[0, 11, 1], layer.scores[0, 14, 4] = 0.09, 0.16  # at 10: sqrt(1.0 * 0.09) = 0.3, sqrt(1.0 * 0.16) = 0.4
    keep = select([layer], Constraints(share_diagonals=0.5, hysteresis=0.0), threshold=0.35)[0][0].keep
    assert [bool(keep[0, row, row - 10]) for row in (11, 12, 13, 14, 15)] == [False, True, True, True, True]
    assert not keep[0, 13, 2]  # at 11: sqrt(0.25 * 0.25)
    assert not keep[1, 12, 2]  # another head
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`share_diagonals`"):
            Constraints(share_diagonals=wrong)


@pytest.mark.parametrize("block", [(4, 4), (8, 4), (4, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_filled_reach_keeps_all_up_to_the_furthest_and_no_further(block, causal):
    layer = _layer(seed=4, pattern=BlockPattern.dense(2, 64, 64, block, causal))
    holes = select([layer], Constraints(), threshold=0.8)[0][0]
    filled = select([layer], Constraints(fill_reach=True), threshold=0.8)[0][0]
    assert not (holes.keep & ~filled.keep).any()
    for head, row in itertools.product(range(2), range(layer.pattern.keep.shape[1])):
        kept = holes.keep[head, row, 1:].nonzero()[:, 0] + 1
        if len(kept):
            stands = (max(row * block[0] // block[1], 1), ((row + 1) * block[0] - 1) // block[1])
            start, end = min(int(kept[0]), stands[0]), max(int(kept[-1]), stands[1])
            assert filled.keep[head, row, 1:].nonzero()[:, 0].tolist() == list(range(start - 1, end))
    assert filled.kept_blocks > 1.2 * holes.kept_blocks
    assert torch.equal(filled.keep[:, :, 0], holes.keep[:, :, 0])  # sinks stand apart


def test_filled_reach_keeps_more_at_the_same_cache():
    layer = _layer()
    rows, cols = torch.arange(16)[:, None], torch.arange(16)
    layer.scores[:, (rows - cols) % 3 == 1] *= 0.1
    bands = {"share_kv_groups": True, "share_diagonals": 1.0, "reach_price": 3.0}
    holes = select([layer], Constraints(**bands), threshold=0.5)[0][0]
    filled = select([layer], Constraints(**bands, fill_reach=True), threshold=0.5)[0][0]
    assert filled.kept_blocks > holes.kept_blocks
    for length in (61, 64, 128):
        assert torch.equal(filled.needed_after(length), holes.needed_after(length))


@pytest.mark.parametrize(("causal", "weight"), [(True, 0.5), (False, 0.0)])
def test_causal_patterns_alone_share_diagonals_unless_told(causal, weight):
    layer = _layer(pattern=BlockPattern.dense(4, 64, 64, 4, causal))
    default, same, other = (
        select([layer], constraints, sparsity=0.6)[0][0].keep
        for constraints in (
            Constraints(),
            Constraints(share_diagonals=weight),
            Constraints(share_diagonals=0.5 - weight),
        )
    )
    assert torch.equal(default, same)
    assert not torch.equal(default, other)


def test_diagonal_of_which_nothing_is_known_stays():
    layer = _layer()
    layer.scores[:, 8:] = torch.inf
    keep = select([layer], Constraints(share_diagonals=1.0), threshold=2.0)[0][0].keep
    assert keep[:, 15, 1:9].all()  # at distances that the first eight rows have at the sink only
    assert not keep[:, 15, 9:15].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"sink_blocks": 1.5},
        {"sink_blocks": True},
        {"recent_blocks": "1"},
        {"regrow": "no"},
        {"protected_layers": "model.layers.0"},
        {"protected_heads": {"model.layers.0": 0}},
    ],
)
def test_constraints_of_another_type_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(TypeError, match=f"`{name}`"):
        Constraints(**arguments)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"sparsity": 0.5}, "Write ConstantSchedule"),
        ({"sparsity": CubicSchedule}, "Write ConstantSchedule"),
        ({"threshold": 0.01}, "Write ConstantSchedule"),
        ({"sparsity": ConstantSchedule(final=0.5), "constraints": {"sink_blocks": 2}}, "Write Constraints"),
    ],
)
def test_a_pruner_names_what_should_have_been_a_schedule_or_constraints(arguments, remedy):
    with pytest.raises(TypeError, match=remedy):
        AttentionPruner(**arguments)


@pytest.mark.parametrize("size", ["64", 64.0, (64, 64.0), (64,), 0, True])
def test_a_block_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="`block_size` must be a positive int or two of them"):
        AttentionPruner(ConstantSchedule(final=0.5), block_size=size)


@pytest.mark.parametrize(("length", "side"), [(1, 16), (1023, 16), (1024, 32), (2047, 32), (2048, 64), (32768, 64)])
def test_short_sequences_get_smaller_blocks(length, side):
    assert suited_block_size(length) == (side, side)


def test_a_loop_of_ones_own_chooses_blocks_at_its_first_update():
    model, tokens = tiny_llama(), torch.randint(0, 32, (2, 64))
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.2))
    pruner.attach(model)
    assert pruner.update(0) is None  # nothing was seen
    reports = []
    for step in (1, 2):
        pruner.probe(True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        pruner.probe(False)
        reports.append(pruner.update(step))
    assert pruner.block_size == (16, 16)
    assert reports[0] is None
    assert reports[1].sparsity == pytest.approx(0.2, abs=0.05)
    several = AttentionPruner(sparsity=ConstantSchedule(final=0.2))
    with pytest.raises(ValueError, match="`block_size` must be given where several processes prune without"):
        several.update(1, reduce=lambda statistics: statistics)


def test_counts_of_numpy_become_ints():
    constraints = Constraints(sink_blocks=np.int64(2), recent_blocks=np.int32(1))
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=np.int64(8), constraints=constraints)
    counts = [constraints.sink_blocks, constraints.recent_blocks, *pruner.block_size]
    assert counts == [2, 1, 8, 8]
    assert {type(count) for count in counts} == {int}


def test_regrowth_and_hysteresis():
    old = select([_layer(seed=1)], Constraints(), sparsity=0.5)[0][0]
    fresh = _layer(seed=2, pattern=old)
    regrown = select([fresh], Constraints(hysteresis=0.0), sparsity=0.5)[0][0]
    sticky = select([fresh], Constraints(hysteresis=0.5), sparsity=0.5)[0][0]
    assert (regrown.keep & ~old.keep).any()
    assert old.difference(sticky) < old.difference(regrown)
    shrunk = select([fresh], Constraints(regrow=False), sparsity=0.6)[0][0]
    assert not (shrunk.keep & ~old.keep).any()


def test_row_mass_keeps_the_fewest_blocks_that_hold_the_mass():
    scores = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])
    torch.testing.assert_close(row_mass(scores), torch.tensor([[[1.0, 0.5, 0.2, 0.05]]]))


def test_nan_scores_name_the_layer():
    layer = _layer("decoder.3")
    layer.scores[0, 5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"decoder\.3"):
        select([layer], Constraints(), sparsity=0.5)


def test_tracker_settles_after_patience_and_starts_again_on_change():
    tracker = StabilityTracker(min_delta=0.1, patience=2)
    assert [tracker.update(c) for c in (0.05, 0.2, 0.1, 0.0)] == [False, False, False, True]
