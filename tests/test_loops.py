"""The loops of docs/loops.md, run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import AttentionPruner, ConstantSchedule

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DOCS = (Path(__file__).parents[1] / "docs" / "loops.md").read_text()
LOOPS = re.findall(r"## ([^\n]+)\n\n```py\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("code", [code for _, code in LOOPS], ids=[name for name, _ in LOOPS])
def test_a_loop_of_the_docs_prunes_and_learns(code, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    rows = torch.randint(50, (12, 1, 64))
    told = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": list(rows),
        "rows": [{"input_ids": row[0], "labels": row[0]} for row in rows],
        "folder": str(tmp_path),
        "checkpoint": tmp_path / "checkpoint.pt",
    }
    before = model.lm_head.weight.clone()
    exec(code, told)
    pruner = told["pruner"]
    assert pruner.total_sparsity == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(before, model.lm_head.weight)
    if "pruner.swap" in code:
        assert all(state.layer.mode == "sparse" for state in pruner.layers.values())


def test_questions_of_the_docs_score_blocks():
    (code,) = re.findall(r"```py\n(from sparse_prune.retrieval.*?)```", DOCS, re.DOTALL)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=16)
    pruner.attach(model)
    exec(code, {"model": model, "pruner": pruner, "tokens": torch.randint(50, (2, 128))})
    for state in pruner.layers.values():
        assert {*state.asked} == {"questions", "repeats"}
        for average in state.asked.values():
            assert average.shape == (4, 8, 8)
            assert average.value().tril().max() > 0.5


def test_all_loops_are_found():
    assert [name for name, _ in LOOPS] == ["Plain PyTorch", "Lightning Fabric", "transformers' Trainer"]
