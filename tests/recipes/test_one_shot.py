"""The benchmarks that prune once: docs/score_statistics.md and docs/constraints.md are made by them."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.pretrained import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "research"


@pytest.fixture
def scores(monkeypatch):
    """The names of `scores.py`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "scores.py")))


@pytest.fixture
def study(scores, tiny_model):
    texts = torch.randint(2, 98, (2, 512), generator=torch.Generator().manual_seed(0))
    return scores.Study(load_model(tiny_model).eval().float(), load_tokenizer(tiny_model), texts, 16)


def test_attention_is_what_the_probe_sees(study):
    found = {name: study.candidates[name]() for name in ("Mean()", "MeanSquare()", "Max()")}
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=16)
    pruner.attach(study.model)
    pruner.probe(True)
    with torch.no_grad():
        for text in study.texts:
            study.model(input_ids=text[None], use_cache=False)
    for name, state in pruner.layers.items():
        seen = state.layer.take_statistics()
        for score, statistic in (("Mean()", "mean"), ("MeanSquare()", "mean_square"), ("Max()", "max")):
            total, count = seen.of(statistic)
            torch.testing.assert_close(found[score][name], (total / count).float())


def test_far_tokens_are_those_that_lose_most_near_by(study, scores):
    (text, start), _ = study.of_far_tokens()
    with torch.no_grad():
        logits = study.model(input_ids=text[None], use_cache=False).logits[0]
        with scores.near_only(study.layers, len(text), study.sides):
            near = study.model(input_ids=text[None], use_cache=False).logits[0]
    assert all(layer.mode == "dense" and layer.pattern is None for layer in study.layers)
    losses = [torch.nn.functional.cross_entropy(part[:-1], text[1:], reduction="none") for part in (logits, near)]
    rise = losses[1] - losses[0]
    assert rise[:64].abs().max() < 1e-4  # they see all that there is
    chosen = rise.topk(51).indices
    torch.testing.assert_close(start(logits), losses[0][chosen].mean())


def test_influence_on_answers_is_that_of_their_lead(study):
    found = study.on_answers
    by_text = study.candidates["Influence() on the text"]()
    assert found.keys() == by_text.keys()
    for name, part in found.items():
        assert part.shape == (study.layers[0].num_heads, 32, 32)
        assert not torch.equal(part, by_text[name])
        assert part.triu(1).abs().max() == 0.0
    assert all(layer.score is None and layer.probe_block_size is None for layer in study.layers)


def test_ranks_go_over_all_layers(scores):
    first = torch.tensor([[[0.5, 9.0], [0.1, 0.7]]])
    second = torch.tensor([[[0.2, 9.0], [0.9, 0.3]]])
    found = scores.ranks({"a": first, "b": second})
    torch.testing.assert_close(found["a"], torch.tensor([[[0.6, 0.0], [0.0, 0.8]]]))
    torch.testing.assert_close(found["b"], torch.tensor([[[0.2, 0.0], [1.0, 0.4]]]))
    best = scores.largest(found, {"a": torch.full((1, 2, 2), 0.7), "b": torch.zeros(1, 2, 2)})
    torch.testing.assert_close(best["a"], torch.tensor([[[0.7, 0.7], [0.7, 0.8]]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variants"),
    [("scores", 11), ("constraints", 12), ("block_sizes", 1)],
)
def test_the_scripts_run(tiny_model, tmp_path, monkeypatch, script, variants):
    sizes = ["--length", "512", "--sparsities", "0.5", "--probes", "1", "--sequences", "1", "--prompts", "1"]
    output = tmp_path / "found.json"
    block = "--block-sizes" if script == "block_sizes" else "--block-size"
    command = [f"{script}.py", "--model", tiny_model, *sizes, block, "32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    found = json.loads(output.read_text())
    assert found["setup"]["length"] == 512
    rows = found["rows"]
    assert len(rows) == 1 + variants
    assert rows[0]["sparsity"] == 0.0
    # A model of random weights answers nothing: its blocks have no influence on answers, and all go.
    assert all(0.3 < row["sparsity"] < 0.8 for row in rows[1:])
    assert len({row["loss"] for row in rows}) > 1
