import re

import pytest
import torch
from retrieval_mass import retrieval_heads, retrieval_scores

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints
from sparse_prune.attention import attach, detach, handle_of
from sparse_prune.evaluation.prompts import passkey_prompt
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.pretrained import load_model


class Merging:
    """Characters are tokens, but even numbers come in pairs of digits: how long a key is depends on the key."""

    def __init__(self, characters):
        self.characters = characters

    def __call__(self, text, **options):
        tokens = []
        for part in re.split(r"(\d+)", text):
            merged = part.isdigit() and int(part) % 2 == 0
            pairs = [2 + int(part[i : i + 2]) % 96 for i in range(0, len(part), 2)] if merged else []
            tokens += pairs or self.characters(part, **options)["input_ids"]
        return {"input_ids": tokens}


@pytest.mark.parametrize("key", [12345, 12346])
@pytest.mark.parametrize("merging", [False, True])
@torch.no_grad()
def test_scores_are_the_attention_that_the_answer_gives_to_the_blocks_of_the_needle(
    tiny_model, monkeypatch, merging, key
):
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    tokenizer = Merging(tokenizer) if merging else tokenizer
    monkeypatch.setattr("random.Random.randrange", lambda *args: key)
    found = retrieval_scores(model, tokenizer, 320, prompts=1)
    tokens = passkey_prompt(tokenizer, 320, key, 0.5).tokens
    hidden = f" The pass key is {key}. Remember it. {key} is the pass key. "
    needle = tokenizer(hidden, add_special_tokens=False)["input_ids"]
    (start,) = [i for i in range(320) if tokens[i : i + len(needle)] == needle]
    blocks = list(range(start // 32, (start + len(needle) - 1) // 32 + 1))
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([tokens]), output_attentions=True).attentions
    for name, weights in zip(found, attentions, strict=True):
        mass = weights[0].unflatten(-1, (10, 32)).sum(-1)  # (heads, rows, blocks)
        expected = mass[:, 288:320][:, :, blocks].amax((1, 2))
        torch.testing.assert_close(found[name].float(), expected, atol=1e-5, rtol=1e-5)


def test_watching_leaves_no_trace(tiny_model):
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    handles = attach(model)
    handles[0].probe_block_size = (8, 8)
    with torch.no_grad():
        model(torch.arange(2, 34)[None], use_cache=False)
    before = handles[0].statistics
    retrieval_scores(model, tokenizer, 300, prompts=2)
    assert handles[0].statistics is before
    detach(model)
    own = model.config._attn_implementation
    assert len(retrieval_scores(model, tokenizer, 300, prompts=1)) == len(handles)
    assert model.config._attn_implementation == own
    assert not any(handle_of(module) for module in model.modules())
    assert [handle.probe_block_size for handle in handles] == [(8, 8), None]
    with pytest.raises(ValueError, match="`prompts`"):
        retrieval_scores(model, tokenizer, 300, prompts=0)


def test_the_strongest_heads_are_protected(tiny_model):
    scores = {"a": torch.tensor([0.1, 0.9, 0.3]), "b": torch.tensor([0.8, 0.2, 0.0])}
    assert retrieval_heads(scores, 0.5) == {"a": (1, 2), "b": (0,)}
    assert retrieval_heads(scores, 0.0) == {}
    with pytest.raises(ValueError, match="`share`"):
        retrieval_heads(scores, 5)
    model = load_model(tiny_model)
    heads = retrieval_heads(retrieval_scores(model, load_tokenizer(tiny_model), 300, prompts=1), 0.25)
    pruner = AttentionPruner(
        sparsity=ConstantSchedule(final=0.5), block_size=8, constraints=Constraints(protected_heads=heads)
    )
    pruner.attach(model)
    pruner.probe(True)
    model(torch.randint(2, 98, (1, 128)), use_cache=False)
    pruner.probe(False)
    pruner.update(step=1)
    dense = {(name, h) for name, p in pruner.patterns.items() for h, s in enumerate(p.head_sparsity) if s == 0}
    assert dense >= {(name, head) for name, part in heads.items() for head in part}
    assert len(dense) < 8
