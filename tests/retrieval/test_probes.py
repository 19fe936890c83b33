"""Probes ask for what stands in them, and only far back."""

import pytest
import torch

from sparse_prune.evaluation import TASKS
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.retrieval import RetrievalProbe, retrieval_probes, text_probes


@pytest.mark.parametrize("length", [128, 200, 1024])
def test_every_answer_stands_in_the_sequence_before(length):
    # Tokens that do not repeat by chance: what follows a triple is known by it alone.
    text = torch.randint(0, 50_000, (3, length), generator=torch.Generator().manual_seed(0))
    probes = retrieval_probes(text, 12, seed=1)
    assert [probe.kind for probe in probes] == ["recall", "repeat"] * 6
    for probe in probes:
        assert probe.tokens.shape == (length,)
        assert probe.tokens.dtype == torch.int64
        assert len(probe.answers)
        tokens = probe.tokens.tolist()
        for place in probe.answers.tolist():
            asked = tokens[place - 3 : place + 1]
            first = next(i for i in range(length) if tokens[i : i + 4] == asked)
            assert first + 3 < place
        assert torch.equal(probe.answers, probe.answers.sort().values)


def test_probes_are_drawn_by_their_seed_from_the_texts_own_tokens():
    text = torch.randint(0, 40, (2, 256), generator=torch.Generator().manual_seed(0)) * 7
    one, same, other = (retrieval_probes(text, 8, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    own = set(text.flatten().tolist())
    assert all(set(probe.tokens.tolist()) <= own for probe in one)


def test_distances_differ_and_several_keys_are_asked_for():
    text = torch.randint(0, 50_000, (1, 1024), generator=torch.Generator().manual_seed(0))
    recalls = [probe for probe in retrieval_probes(text, 40) if probe.kind == "recall"]
    assert {len(probe.answers) for probe in recalls} == {4, 8, 16, 32}
    gaps = []
    for probe in recalls:
        tokens, place = probe.tokens.tolist(), int(probe.answers[0])
        asked = tokens[place - 3 : place + 1]
        gaps.append(place - next(i for i in range(1024) if tokens[i : i + 4] == asked) - 3)
    assert min(gaps) < 300
    assert max(gaps) > 800


def test_an_answer_leads_by_its_logit_less_the_largest_other_one_and_by_8_at_most():
    probe = RetrievalProbe("recall", torch.tensor([5, 0, 1, 2]), torch.tensor([1, 2, 3]))
    logits = torch.zeros(4, 6)
    logits[0, :2] = torch.tensor([3.0, 1.0])  # leads by 2
    logits[1, :3] = torch.tensor([3.0, 1.0, 0.0])  # does not lead
    logits[2, 2] = 20.0
    logits.requires_grad_()
    lead = probe.lead(logits)
    assert lead.item() == pytest.approx((2.0 + 0.0 + 8.0) / 3)
    lead.backward()
    assert logits.grad[0, 0] == pytest.approx(1 / 3)
    assert logits.grad[1:].abs().max() == 0.0


def test_sequences_without_room_are_refused():
    with pytest.raises(ValueError, match="`sequences` must hold at least 128 tokens each for retrieval probes, got 64"):
        retrieval_probes(torch.zeros(1, 64, dtype=torch.int64), 2)


@pytest.mark.parametrize(("length", "facts"), [(180, 1), (400, 3), (1500, 8)])
def test_questions_in_words_have_their_facts_in_the_text_and_no_test_wording(tiny_model, length, facts):
    tokenizer = load_tokenizer(tiny_model)
    text = torch.full((2, length), tokenizer("and")["input_ids"][0])
    probes = text_probes(tokenizer, text, 8, seed=2)
    tested = {wording.question.partition("{")[0].strip() for task in TASKS.values() for wording in task.test}
    asked_in = set()
    for probe in probes:
        assert probe.tokens.shape == (length,)
        tokens, answers = probe.tokens.tolist(), probe.answers.tolist()
        asked = [[answers[0]]]  # places of every answer
        for place in answers[1:]:
            asked += [[place]] if place > asked[-1][-1] + 1 else []
            asked[-1] += [place] if place > asked[-1][-1] else []
        assert len(asked) == facts
        assert answers[-1] == length - 1
        for places in asked:
            answer = tokens[places[0] : places[-1] + 1]
            assert any(tokens[start : start + len(answer)] == answer for start in range(places[0] - 10))
            asked_in.add(tokenizer.decode(tokens[places[0] - 12 : places[0]]))
        words = tokenizer.decode(tokens)
        assert not any(test and test in words for test in tested)
    assert len(asked_in) > facts  # many wordings
    assert not torch.equal(probes[0].tokens, text_probes(tokenizer, text, 8, seed=3)[0].tokens)
