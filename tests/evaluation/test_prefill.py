from functools import partial

import pytest
import torch

from sparse_prune.attention import attach
from sparse_prune.evaluation import TASKS, fresh_cache, measure_task
from sparse_prune.evaluation.meter import answer
from sparse_prune.evaluation.prefill import prefilled
from sparse_prune.evaluation.tasks import build
from sparse_prune.fixed_patterns import random_pattern
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.pretrained import load_model


class Reader:
    """Appends what it reads to its cache, a list, and counts it."""

    device = torch.device("cpu")
    read = 0

    def __call__(self, input_ids, past_key_values, logits_to_keep):
        past_key_values += input_ids[0].tolist()
        self.read += input_ids.shape[1]


TEXT = list(range(100))


@pytest.mark.parametrize(
    ("contexts", "read"),
    [
        ([TEXT], 100),
        ([], 0),
        ([TEXT[:30] + [900] + TEXT[30:], TEXT[:70] + [900] + TEXT[70:]], 30 + 71 + 71),
        # Whatever its first token is, the fact that stands first leaves the text first.
        ([TEXT[:70] + [-1, 5], TEXT[:10] + [900, 5], TEXT[:10] + [-1, 5], TEXT[:40] + [900, 5]], 70 + 4 * 2),
        ([TEXT, TEXT, TEXT[:50]], 100),
        ([[1, 2], [3, 4], []], 4),
    ],
    ids=["one", "none", "two places", "four places", "the same", "nothing shared"],
)
def test_what_contexts_begin_with_is_read_once(contexts, read):
    model = Reader()
    found = dict(prefilled(model, contexts, list))
    assert [found[index] for index in range(len(contexts))] == contexts
    assert model.read == read


def test_every_cache_is_the_callers_own():
    for _, cache in prefilled(Reader(), [TEXT[:50] + [900], TEXT, TEXT + [7]], list):
        held = list(cache)
        cache += [1000] * 5  # a question
        assert 1000 not in held


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", ["passkey", "multi_query", "turns", "common_words"])
def test_tasks_are_answered_as_after_prefills_of_their_own(tiny_model, name, pruned):
    model, tokenizer, filler = load_model(tiny_model).eval(), load_tokenizer(tiny_model), list(range(40, 70))
    if pruned:
        for handle in attach(model):
            handle.pattern = random_pattern(handle.num_heads, 480, 16, density=0.5)
            handle.mode = "sparse"
    make_cache = partial(fresh_cache, model)
    score = measure_task(model, tokenizer, TASKS[name], filler, 480, make_cache, prompts=8, depths=(0.1, 0.5, 0.9))
    expected = []
    for index in range(len(score.answers)):
        example = build(TASKS[name], tokenizer, filler, 480, (0.1, 0.5, 0.9)[index % 3], index)
        [(_, cache)] = prefilled(model, [example.context], make_cache)
        expected += answer(model, example, cache)
    expected = expected[: len(score.answers)]
    assert [answered.depth for answered in score.answers] == [answered.depth for answered in expected]
    assert [found.log_prob for found in score.answers] == pytest.approx(
        [alone.log_prob for alone in expected], rel=1e-4
    )
