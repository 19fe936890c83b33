"""Heads are found by what their far field does for answers, and nothing is left changed."""

import pytest
import torch

from sparse_prune.attention import attach
from sparse_prune.retrieval import RetrievalProbe, far_field_influence, strongest_heads
from sparse_prune.scores import FarField
from sparse_prune.scores.call import AttentionCall
from support.tiny import tiny_llama

LENGTH = 160


@torch.no_grad()
def probes(model, count=2, kinds=("recall", "repeat")):
    """Their last token is what the model says, the one before is not."""
    generator, made = torch.Generator().manual_seed(3), []
    for index in range(count):
        tokens = torch.randint(0, 32, (LENGTH,), generator=generator)
        tokens[-1] = model.eval()(input_ids=tokens[None]).logits[0, -2].argmax()
        made.append(RetrievalProbe(kinds[index % len(kinds)], tokens, torch.arange(LENGTH - 2, LENGTH)))
    return made


@pytest.mark.parametrize(("causal", "extra"), [(True, 0), (False, 0), (True, 7)])
def test_far_field_is_the_change_of_a_linear_loss(causal, extra):
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (
        torch.randn(2, 4, 50 + added, 8, generator=generator, dtype=torch.float64) for added in (0, extra, extra, 0)
    )
    score = FarField(sink_blocks=1, recent_blocks=2)
    found = score.probe(AttentionCall(query, key, (8, 8), causal, value, gradient)).sums[0].sum((1, 2))
    row, col = torch.arange(50)[:, None] + (extra if causal else 0), torch.arange(50 + extra)
    seen = col <= row if causal else torch.ones(50, 50 + extra, dtype=torch.bool)
    near = (col // 8 < 1) | ((row // 8 - col // 8).abs() < 2)
    logits = query @ key.transpose(-1, -2) * 8**-0.5

    def loss(mask):
        output = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        return (output * gradient).sum((0, 2, 3))

    torch.testing.assert_close(found, loss(seen & near) - loss(seen), rtol=1e-4, atol=1e-4)


def test_influence_is_what_autograd_says(monkeypatch):
    model = tiny_llama().eval()
    (probe,) = probes(model, 1, ("recall",))
    handles = attach(model)
    found = far_field_influence(model, lambda tokens: model(input_ids=tokens).logits, handles, [probe])
    # By hand: the gradient of the mean lead in each attention output, times its change without the far field.
    calls = {}
    attend = type(handles[0]).attend

    def watch(self, query, key, value, options, *, dense, **others):
        output = dense()
        output.retain_grad()
        calls[self.name] = (query.detach(), key.detach(), value.detach(), output)
        return output

    monkeypatch.setattr(type(handles[0]), "attend", watch)
    handles[0].score, handles[0].probe_block_size = FarField(), (8, 8)  # else a layer without a pattern is idle
    handles[1].score, handles[1].probe_block_size = FarField(), (8, 8)
    logits = model(input_ids=probe.tokens[None]).logits[0]
    monkeypatch.setattr(type(handles[0]), "attend", attend)
    rows, target = logits[probe.answers - 1], probe.tokens[probe.answers]
    own = rows.gather(1, target[:, None])[:, 0]
    others = torch.stack([torch.cat([row[:t], row[t + 1 :]]).max() for row, t in zip(rows, target, strict=True)])
    lead = (own - others).clamp(0.0, 8.0).mean()
    lead.backward()
    by_hand = {}
    for name, (query, key, value, output) in calls.items():
        score = FarField(recent_blocks=2)
        call = AttentionCall(query, key, (32, 32), True, value, -output.grad)
        by_hand[name] = score.probe(call).sums[0].sum((1, 2))
    positive = sum(part.clamp_min(0).sum() for part in by_hand.values())
    for name, part in by_hand.items():
        torch.testing.assert_close(found[name], part / positive, rtol=1e-3, atol=1e-5)


def test_nothing_is_left_behind(monkeypatch):
    model = tiny_llama()
    asked = probes(model)
    model.train()
    handles = attach(model)
    model(input_ids=torch.zeros(1, 20, dtype=torch.int64), labels=torch.zeros(1, 20, dtype=torch.int64)).loss.backward()
    before = [vars(handle).copy() for handle in handles]
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.get_input_embeddings().weight.requires_grad_(False)
    monkeypatch.setattr("sparse_prune.attention.layer.probe_attention", None)  # row mass would cost time for nothing
    first, second = (
        far_field_influence(model, lambda tokens: model(input_ids=tokens).logits, handles, asked) for _ in range(2)
    )
    assert [vars(handle) for handle in handles] == before
    assert model.training
    assert not model.get_input_embeddings().weight.requires_grad
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, gradients[name])
    for name, part in first.items():
        assert torch.equal(part, second[name])


def test_every_kind_of_probe_counts_alike():
    model = tiny_llama()
    handles = attach(model)

    def positive(made):
        found = far_field_influence(model, lambda tokens: model(input_ids=tokens).logits, handles, made)
        return sum(float(part.clamp_min(0).sum()) for part in found.values())

    assert positive(probes(model, 1)) == pytest.approx(1.0)
    assert positive(probes(model, 3, ("recall",))) == pytest.approx(1.0)


def test_what_the_model_does_not_find_tells_nothing():
    model = tiny_llama()
    (probe,) = probes(model, 1)
    missed = RetrievalProbe("recall", probe.tokens.roll(1), torch.tensor([LENGTH - 1]))
    found = far_field_influence(model, lambda tokens: model(input_ids=tokens).logits, attach(model), [missed])
    assert all(float(part.abs().max()) == 0.0 for part in found.values())


def test_the_strongest_are_taken_by_head_or_by_group():
    influence = {"a": torch.tensor([5.0, 0.0, 1.0, 3.0]), "b": torch.tensor([-1.0, 4.0, 2.0, 2.0])}
    assert strongest_heads(influence, 0.25) == {"a": (0,), "b": (1,)}
    assert strongest_heads(influence, 0.5) == {"a": (0, 3), "b": (1, 2)}
    assert strongest_heads(influence, 1.0) == {"a": (0, 2, 3), "b": (1, 2, 3)}  # no influence, no head
    groups = {"a": 2, "b": 2}
    assert strongest_heads(influence, 0.25, groups) == {"a": (0, 1)}
    assert strongest_heads(influence, 0.5, groups) == {"a": (0, 1, 2, 3)}
    with pytest.raises(ValueError, match=r"`share` must lie in \[0, 1\], got 15"):
        strongest_heads(influence, 15)
