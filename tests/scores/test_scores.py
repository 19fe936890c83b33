"""A score is a class: the project's own, and a user's, in every mode of a layer."""

import pytest
import torch

from sparse_prune import (
    AttentionPruner,
    BlockPattern,
    BlockStatistics,
    ConstantSchedule,
    Constraints,
    Influence,
    LayerScores,
    MassGradient,
    MassShare,
    Max,
    Mean,
    MeanSquare,
    OutputChange,
    Score,
    probe_blocks,
    select,
)
from sparse_prune.attention import PrunableAttention
from sparse_prune.kernels import AttentionOptions, probe_score
from sparse_prune.scores import AttentionCall

HEADS, KV_HEADS, LENGTH, DIM, BLOCK = 4, 2, 22, 8, 4
SIDES = (BLOCK, BLOCK)


def tensors(length=LENGTH, head_dim=DIM):
    """Query, key, value and gradient."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(2, count, length, head_dim, generator=generator) for count in heads]


class LargestWeight(Score):
    """A user's own: the largest attention probability of a single key."""

    per = "sample"

    def add(self, tile):
        side = tile.call.block_size[1]
        blocks = torch.nn.functional.pad(tile.weights, (0, tile.kv_blocks * side - tile.seen))
        return blocks.unflatten(-1, (-1, side)).amax(-1).amax(2).sum(0)


class Pull(LargestWeight):
    """A user's own that sees gradients."""

    sees = "gradient"

    def add(self, tile):
        return tile.per_block(tile.weights * tile.gradient_by_key).abs().sum((0, 2))


@pytest.mark.parametrize("score", [Mean(), MeanSquare(), Max()])
@pytest.mark.parametrize("causal", [True, False])
def test_row_mass_scores_are_the_statistics_of_that_name(score, causal):
    query, key, *_ = tensors()
    total, weight = probe_blocks(query, key, SIDES, causal=causal).of(score.statistic)
    own = score.probe(AttentionCall(query, key, SIDES, causal))
    assert own.kinds == (score.kind,) == (score.statistic,)
    assert torch.equal(own.sums[0], total)
    assert torch.equal(own.counts[0], weight)


def test_names_of_before_are_scores():
    def used(**changes):
        return type(AttentionPruner(ConstantSchedule(final=0.5), **changes).score_used)

    assert used() is Max
    assert used(statistic="mean_square") is MeanSquare
    assert used(criterion="row_mass", statistic="max") is MassShare
    assert used(score=Influence()) is Influence


def test_what_is_no_score_is_refused():
    with pytest.raises(TypeError, match="`score` must be a Score or None, got 'mean'. Write Influence"):
        AttentionPruner(ConstantSchedule(final=0.5), score="mean")
    with pytest.raises(ValueError, match=r"Give `score` or `statistic` and `criterion`, got Influence\(\), 'mean'"):
        AttentionPruner(ConstantSchedule(final=0.5), score=Influence(), statistic="mean")
    with pytest.raises(ValueError, match="`statistic` must be one of .*, got 'median'"):
        AttentionPruner(ConstantSchedule(final=0.5), statistic="median")


def dense_attention(query, key, value):
    group = HEADS // KV_HEADS
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * DIM**-0.5
    logits.requires_grad_()
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return logits, weights, weights @ value, value


def by_block(numbers):
    pad = -LENGTH % BLOCK
    return torch.nn.functional.pad(numbers, (0, pad)).unflatten(-1, (-1, BLOCK)).sum(-1)


def largest_of_rows(numbers):
    """(batch, heads, length, blocks) to sums over samples of a block's largest, (heads, blocks, blocks)."""
    return torch.stack([part.amax(2).sum(0) for part in numbers.split(BLOCK, 2)], 1)


def test_mass_gradient_answers_to_logits():
    query, key, value, gradient = tensors()
    logits, weights, output, _ = dense_attention(query, key, value)
    (answer,) = torch.autograd.grad(output, logits, gradient)
    mass = torch.stack([part.amax(2) for part in by_block(weights.detach()).split(BLOCK, 2)], 2)
    slope = torch.stack([part.amax(2) for part in by_block(answer).abs().split(BLOCK, 2)], 2)
    seen = MassGradient().probe(AttentionCall(query, key, SIDES, True, value=value, gradient=gradient))
    torch.testing.assert_close(seen.sums[0].float(), (mass * slope).sqrt().sum(0), rtol=1e-4, atol=1e-3)
    assert seen.counts.flatten().tolist() == [2.0] * 6


def test_output_change_is_how_far_the_output_moves():
    query, key, value, _ = tensors()
    _, weights, output, values = dense_attention(query, key, value)
    wanted = torch.zeros(2, HEADS, LENGTH, 6)
    for col in range(6):
        keys = slice(col * BLOCK, (col + 1) * BLOCK)
        held, mass = weights[..., keys] @ values[:, :, keys], weights[..., keys].sum(-1)
        wanted[..., col] = (mass[..., None] * output - held).norm(dim=-1)
    seen = OutputChange().probe(AttentionCall(query, key, SIDES, True, value=value))
    torch.testing.assert_close(seen.sums[0].float(), largest_of_rows(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", [LargestWeight(), Pull(), Influence(), OutputChange()])
@pytest.mark.parametrize("backend", ["masked", "sdpa", "gather", "reference", "triton"])
def test_a_score_sees_the_same_in_every_backend(score, backend):
    sides = (16, 16)
    query, key, value, gradient = (part.requires_grad_() for part in tensors(40, 16))
    layer = PrunableAttention("layer", HEADS, KV_HEADS, causal=True, score=score, probe_block_size=sides)
    keep = torch.rand(HEADS, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    possible = BlockPattern.dense(HEADS, 40, 40, sides, True).possible
    layer.pattern = BlockPattern((keep | torch.eye(3, dtype=torch.bool)) & possible, sides, True, 40, 40)
    layer.mode, layer.backend = ("masked", "sdpa") if backend == "masked" else ("sparse", backend)
    output = layer.attend(query, key, value, AttentionOptions(), dense=lambda: pytest.fail("not dense"))
    layer.gradient_scale = 8.0
    plain = torch.autograd.grad((output * gradient.detach()).sum() * 8.0, query)[0]
    wanted = probe_score(
        score, query.detach(), key.detach(), value.detach(), sides, causal=True, options=AttentionOptions(),
        gradient=gradient.detach(), pattern=layer.pattern,
    )  # fmt: skip
    seen = layer.take_statistics((score.kind, "mean"))
    assert seen.kinds == (score.kind, "mean")
    total, weight = seen.of(score.kind)
    torch.testing.assert_close(total, wanted.sums[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, wanted.counts[0])
    assert torch.equal(seen.of("mean")[0], probe_blocks(query, key, sides, causal=True).of("mean")[0])
    # Watching changes neither the output nor the gradients.
    layer.probe_block_size = None
    again = layer.attend(query, key, value, AttentionOptions(), dense=lambda: pytest.fail("not dense"))
    assert torch.equal(again, output)
    assert torch.equal(torch.autograd.grad((again * gradient.detach()).sum() * 8.0, query)[0], plain)


def test_own_sums_add_up_beside_row_mass_at_any_length():
    query, key, *_ = tensors()
    score = LargestWeight()
    short = score.probe(AttentionCall(query[:, :, :9], key[:, :, :9], SIDES, True))
    long = score.probe(AttentionCall(query, key, SIDES, True))
    both = short + long
    assert both.kinds == ("LargestWeight",)
    assert both.counts[0, 0, :, 0].tolist() == [4.0] * 3 + [2.0] * 3
    assert both.counts[0, 0, :, 5].tolist() == [2.0] * 6
    beside = probe_blocks(query, key, SIDES, causal=True).beside(both, score.kind)
    assert torch.equal(beside.of(score.kind)[0], both.sums[0])
    assert torch.equal(beside.of("max")[0], probe_blocks(query, key, SIDES, causal=True).of("max")[0])
    none = probe_blocks(query, key, SIDES, causal=True).beside(None, score.kind)
    assert float(none.of(score.kind)[1].sum()) == 0


def test_a_score_that_looks_at_what_it_does_not_see_is_told_so():
    query, key, value, gradient = tensors()

    class Blind(Pull):
        sees = "keys"

    class HalfBlind(Pull):
        sees = "values"

    arguments = {"causal": True, "options": AttentionOptions(), "gradient": gradient}
    with pytest.raises(ValueError, match='uses the gradient.*Write `sees = "gradient"`'):
        probe_score(Blind(), query, key, value, SIDES, **arguments)
    with pytest.raises(ValueError, match='uses the gradient.*Write `sees = "gradient"`'):
        probe_score(HalfBlind(), query, key, value, SIDES, **arguments)

    class Flat(Pull):
        def add(self, tile):
            return tile.weights.sum()

    with pytest.raises(ValueError, match=r"`Flat.add` must return \(num_heads, kv_blocks\) = \(4, 1\), got \(\)"):
        probe_score(Flat(), query, key, value, SIDES, **arguments)


def signed_layer(scores, **changes):
    scores = torch.tensor(scores)
    blocks = scores.shape[1]
    pattern = BlockPattern.dense(len(scores), blocks * BLOCK, blocks * BLOCK, SIDES, True)
    return LayerScores("a", scores, pattern, **{"num_kv_heads": len(scores), **changes})


FREE = Constraints(share_diagonals=0.0, sink_blocks=0, hysteresis=0.0)


def test_negative_scores_go_one_by_one():
    layer = signed_layer([[[9.0, 0, 0, 0], [-3, 9, 0, 0], [-1, 0.0, 9, 0], [2, -2, 1, 9]]])
    kept = [
        select([layer], FREE, sparsity=count / 10, signed=True)[0][0].keep.int()[0].tolist() for count in (0, 1, 3, 4)
    ]
    assert [sum(map(sum, rows)) for rows in kept] == [10, 9, 7, 6]
    assert kept[2] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]
    patterns, threshold = select([layer], FREE, threshold=0.0, signed=True)
    assert threshold == 0.0
    assert patterns[0].keep.int()[0].tolist() == kept[2]
    assert select([layer], FREE, sparsity=1.0, signed=True)[0][0].kept_blocks == 4


def test_signed_scores_are_shared_by_sums_and_means():
    layer = signed_layer([[[9.0, 0], [-3, 9]], [[9, 0], [2, 9]]], num_kv_heads=1)
    group = Constraints(share_diagonals=0.0, sink_blocks=0, hysteresis=0.0, share_kv_groups=True)
    assert select([layer], group, threshold=-0.9, signed=True)[0][0].keep[:, 1, 0].tolist() == [False, False]
    assert select([layer], group, threshold=-1.1, signed=True)[0][0].keep[:, 1, 0].tolist() == [True, True]
    diagonal = signed_layer([[[9.0, 0, 0], [-4, 9, 0], [0, 2, 9]]])
    shared = Constraints(share_diagonals=1.0, sink_blocks=0, hysteresis=0.0)
    assert select([diagonal], shared, threshold=-1.1, signed=True)[0][0].keep[0, [1, 2], [0, 1]].all()
    assert not select([diagonal], shared, threshold=-0.9, signed=True)[0][0].keep[0, [1, 2], [0, 1]].any()


def test_a_kept_block_is_the_harder_to_prune_whatever_its_sign():
    layer = signed_layer([[[9.0, 0], [-1.0, 9]]])
    sticky = Constraints(share_diagonals=0.0, sink_blocks=0, hysteresis=1.0)
    assert select([layer], sticky, threshold=-0.6, signed=True)[0][0].keep[0, 1, 0]
    assert not select([layer], FREE, threshold=-0.6, signed=True)[0][0].keep[0, 1, 0]


def test_unknown_blocks_stay_whatever_a_score_makes_of_them():
    class Negated(LargestWeight):
        signed = True

        def value(self, average):
            return -average

    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=BLOCK, score=Negated(), constraints=FREE)
    pruner._begin([PrunableAttention("a", HEADS, KV_HEADS, causal=True)])
    state = pruner.layers["a"]
    counts = torch.tensor([[4.0] * 6, [1.0] * 6]).view(2, 1, 6, 1)
    state.layer.statistics = BlockStatistics(torch.rand(3, HEADS, 6, 6), counts)
    own = torch.tensor([1.0] * 5 + [0.0]).view(1, 1, 6, 1)
    state.layer.score_sums = BlockStatistics(torch.rand(1, HEADS, 6, 6).tril(), own, (Negated().kind,))
    pruner.update(1)
    assert state.layer.pattern.keep[:, 5].all()
    assert pruner.total_sparsity == pytest.approx(0.5, abs=0.03)
