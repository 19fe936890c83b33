import re
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sparse_prune.evaluation import fresh_cache
from sparse_prune.evaluation.meter import Answered, TaskScore, answer, counted, measure_task, table, wilson
from sparse_prune.evaluation.prefill import prefilled
from sparse_prune.evaluation.tasks import TASKS, build
from sparse_prune.evaluation.tasks.pools import NAMES as CITIES
from sparse_prune.evaluation.tasks.pools import VARIABLES, WORDS
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.pretrained import load_model

NAMES = sorted(TASKS)
FILLER = list(range(40, 70))


class Stub:
    """Knows the answers of the examples it was shown, or none."""

    device = torch.device("cpu")

    def __init__(self, examples):
        self.known = {tuple(q.tokens + q.answer) for example in examples for q in example.questions}

    def __call__(self, input_ids, past_key_values, logits_to_keep=0):
        row, logits = input_ids[0], torch.zeros(1, input_ids.shape[1], 98)
        if tuple(row.tolist()) in self.known:
            logits[0, :-1] = torch.nn.functional.one_hot(row[1:], 98) * 50.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.mark.parametrize("name", NAMES)
def test_examples_have_the_length_asked_for_and_tell_their_answers(tokenizer, name):
    example = build(TASKS[name], tokenizer, FILLER, 480, 0.3, 1)
    ends = [len(q.tokens) + len(q.answer) for q in example.questions]
    assert len(example.context) + (sum(ends) if example.turns else max(ends)) == 480
    text = tokenizer.decode(example.context).replace(" ", "")
    for question in example.questions:
        answer_text = tokenizer.decode(question.answer).replace(" ", "")
        assert all(part in text for part in answer_text.replace("and", ",").split(","))


@pytest.mark.parametrize("name", NAMES)
def test_wordings_for_choosing_and_testing_are_disjoint(name):
    task = TASKS[name]
    for field in ("fact", "question"):
        assert not {getattr(w, field) for w in task.choose} & {getattr(w, field) for w in task.test}
    with pytest.raises(ValueError, match="`split`"):
        task.wordings("train")


@pytest.mark.parametrize("name", NAMES)
def test_names_words_and_numbers_are_not_shared_by_the_splits(tokenizer, name):
    words = {split: text.split() for split, text in WORDS.items()}
    for pool in (CITIES, VARIABLES, words):
        assert not set(pool["choose"]) & set(pool["test"])
    answers = {
        split: {
            tokenizer.decode(question.answer)
            for seed in range(40)
            for question in build(TASKS[name], tokenizer, FILLER, 480, 0.3, seed, split).questions
        }
        for split in ("choose", "test")
    }
    assert not answers["choose"] & answers["test"]
    if name == "passkey":
        parity = {split: {sum(map(int, a.replace(" ", ""))) % 2 for a in found} for split, found in answers.items()}
        assert parity == {"choose": {1}, "test": {0}}


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_the_links_of_a_chain_lie_apart_and_in_order(tokenizer, depth):
    example = build(TASKS["variable_tracking"], tokenizer, FILLER, 480, depth, 1)
    text = tokenizer.decode(example.context).replace(" ", "")
    value = tokenizer.decode(example.questions[0].answer).replace(" ", "")
    links = re.findall(r"VAR([A-Z])=([A-Z]|\d{5})", text)
    assert [what for _, what in links] == [value, links[0][0], links[1][0]]
    places = [text.index(f"VAR{name}={what}") for name, what in links]
    assert min(later - earlier for earlier, later in pairwise(places)) > len(text) / 5


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_scores_all_and_a_blind_model_nothing(tokenizer, name):
    ask = partial(measure_task, tokenizer=tokenizer, task=TASKS[name], filler=FILLER, length=480, prompts=8)
    examples = [build(TASKS[name], tokenizer, FILLER, 480, (0.1, 0.3, 0.5, 0.7, 0.9)[i % 5], i) for i in range(8)]
    oracle = ask(Stub(examples), make_cache=object)
    assert len(oracle.answers) >= 8
    assert oracle.accuracy == 1
    assert oracle.log_prob == pytest.approx(0, abs=1e-3)
    assert ask(Stub([]), make_cache=object).accuracy == 0


class Reader(torch.nn.Module):
    """Without a cache; answers right if the answer stands within its view, and says so in the last logits alone."""

    device = torch.device("cpu")

    def __init__(self, view, answer):
        super().__init__()
        self.view, self.answer = view, answer

    def forward(self, input_ids, use_cache, logits_to_keep):
        key = input_ids[0, -self.answer :]
        seen = input_ids[0, -self.view : -self.answer].unfold(0, self.answer, 1)
        found = bool((seen == key).all(-1).any())
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 98).float()[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits if found else -logits)


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_depths_are_told_apart(tokenizer, name):
    ask = partial(measure_task, tokenizer=tokenizer, task=TASKS[name], filler=FILLER, length=480, depths=(0.1, 0.9))
    count = len(build(TASKS[name], tokenizer, FILLER, 480, 0.1, 0).questions[0].answer)

    def found(view):
        return {depth: part.accuracy for depth, part in ask(Reader(view, count), prompts=4).by_depth().items()}

    assert found(1000) == {0.1: 1.0, 0.9: 1.0}
    assert found(250) == {0.1: 0.0, 0.9: 1.0}


class Oracle(torch.nn.Module):
    """Without a cache, and with the logits of all tokens; answers right, or with one wrong token."""

    device = torch.device("cpu")

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, input_ids, use_cache):
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 98).float()
        if self.wrong:
            logits[:, -2] = 0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("wrong", [False, True])
def test_every_token_of_an_answer_must_be_right(tokenizer, wrong):
    assert measure_task(Oracle(wrong), tokenizer, TASKS["passkey"], FILLER, 300, prompts=3).accuracy == 1.0 - wrong


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["multi_query", "turns"])
def test_one_prefill_answers_as_fresh_prompts_do(tiny_model, tokenizer, name, cached):
    model = load_model(tiny_model).eval()
    example = build(TASKS[name], tokenizer, FILLER, 480, 0.3, 1)
    before = example.context
    cache = None
    if cached:
        [(_, cache)] = prefilled(model, [before], partial(fresh_cache, model))
    for question, got in zip(example.questions, answer(model, example, cache), strict=True):
        whole = torch.tensor([before + question.tokens + question.answer])
        with torch.no_grad():
            logits = model(whole).logits[0, -len(question.answer) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(question.answer)[:, None]).mean()
        assert got.log_prob == pytest.approx(float(expected), rel=1e-4)
        if example.turns:
            before = before + question.tokens + question.answer


def test_intervals_are_wilsons():
    assert wilson(60, 60) == (pytest.approx(0.940, abs=5e-4), pytest.approx(1.0))
    assert wilson(3, 4) == (pytest.approx(0.301, abs=1e-3), pytest.approx(0.954, abs=1e-3))
    assert wilson(0, 10)[0] == 0
    with pytest.raises(ValueError, match="2 of 1"):
        wilson(2, 1)


def test_only_what_dense_solves_counts():
    def score(right):
        return TaskScore([Answered(index < right, -1.0, (0.1, 0.9)[index % 2]) for index in range(10)])

    assert counted(score(8))
    assert not counted(score(7))
    assert "not counted, dense solves 70%" in table([("needle", score(7), score(1))])
    low, high = wilson(5, 10)
    assert score(5).numbers == {"accuracy": 0.5, "low": low, "high": high, "log_prob": -1.0, "questions": 10}
    assert {depth: part.accuracy for depth, part in score(5).by_depth().items()} == {0.1: 0.6, 0.9: 0.4}


def test_what_does_not_fit_is_refused(tokenizer):
    for arguments, named in (((FILLER, 10, 0.5), "length"), ((FILLER, 480, 2.0), "depth"), (([], 480, 0.5), "filler")):
        with pytest.raises(ValueError, match=f"`{named}` must"):
            build(TASKS["needle"], tokenizer, *arguments, seed=0)
