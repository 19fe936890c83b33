import pytest
import torch
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.finetune.pretrained import load_tokenizer

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints
from sparse_prune.attention import attach
from sparse_prune.passkey import passkey_prompt
from sparse_prune.retrieval_heads import retrieval_heads, retrieval_scores


@torch.no_grad()
def test_scores_are_the_attention_that_the_answer_gives_to_the_block_of_the_key(tiny_model, monkeypatch):
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    keys = iter([12345])
    monkeypatch.setattr("random.Random.randrange", lambda *args: next(keys))
    found = retrieval_scores(model, tokenizer, 320, prompts=1)
    tokens, answer = passkey_prompt(tokenizer, 320, 12345, 0.5)
    key = tokens[-5:]
    places = [i for i in range(320 - answer - 1) if tokens[i : i + 5] == key]
    assert len(places) == 2  # the needle tells the key twice
    blocks = sorted({(place + offset) // 32 for place in places for offset in range(5)})
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
