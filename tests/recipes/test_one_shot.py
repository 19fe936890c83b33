"""The benchmarks that prune once: docs/score_statistics.md and docs/constraints.md are made by them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.attention import attach
from sparse_prune.recipes.causal_lm.pretrained import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "research"


@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "score_candidates.py"))["record"]


@pytest.fixture
def model(tiny_model):
    return load_model(tiny_model).eval().float()


@pytest.fixture
def tokens():
    return torch.randint(2, 98, (1, 64), generator=torch.Generator().manual_seed(0))


def test_mass_is_what_the_probe_sees(record, model, tokens):
    found = record(model, tokens, 16)
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=16)
    pruner.attach(model)
    pruner.probe(True)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for name, state in pruner.layers.items():
        seen = state.layer.take_statistics()
        for score, statistic in (("mean", "mean"), ("mean square", "mean_square"), ("max", "max")):
            torch.testing.assert_close(
                found[f"mass, {score}"][name].double(), seen.of(statistic)[0], atol=1e-5, rtol=1e-4
            )


def test_the_gradient_score_is_the_slope_of_the_loss(record, model, tokens):
    tokens = tokens[:, :12]
    step = 0.2  # the loss comes in float32
    layer = attach(model)[-1]
    scores = record(model, tokens, 1)["gradient, mean"][layer.name]
    head, row, column = torch.unravel_index(scores.argmax(), scores.shape)

    def loss(bias):
        def attend(query, key, value, options, **dense):
            group = layer.num_heads // layer.num_kv_heads
            keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            logits = query @ keys.mT * (options.scale or query.shape[-1] ** -0.5)
            logits[0, head, row, column] += bias
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values

        layer.attend = attend
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss.double()

    model.double()
    slope = abs(loss(step) - loss(-step)) / (2 * step) * tokens.shape[1]
    assert slope > 0
    torch.testing.assert_close(scores.max().double(), slope, rtol=0.05, atol=0.0)


def test_a_block_of_everything_moves_nothing(record, model, tokens):
    found = record(model, tokens, 64)
    for name in ("output, max", "output, mean square", "gradient, max", "gradient, mean"):
        for scores in found[name].values():
            assert scores.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "variants"),
    [("score_candidates", 10), ("score_statistics", 3), ("constraints", 12), ("block_sizes", 1)],
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
    assert all(0.3 < row["sparsity"] < 0.6 for row in rows[1:])
    assert len({row["loss"] for row in rows}) > 1
