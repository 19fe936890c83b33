"""Looking at a model's calls gives the statistics of a training probe, and leaves nothing changed."""

import torch

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.retrieval import look_at, repeat_passages
from support.tiny import tiny_llama

TOKENS = torch.randint(0, 32, (3, 64), generator=torch.Generator().manual_seed(5))


def attached():
    model = tiny_llama()
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=8)
    pruner.attach(model)
    return model, pruner


def test_the_statistics_are_those_of_a_probe_with_all_connections():
    model, pruner = attached()
    layers = [state.layer for state in pruner.layers.values()]
    pruner.probe(True)
    model.eval()(input_ids=TOKENS)
    pruner.probe(False)
    wanted = {layer.name: layer.take_statistics(("max",)) for layer in layers}
    pruner.probe(True)
    model.train()(input_ids=TOKENS[:1])  # a training step, which is not to be lost
    pruner.update(1)
    assert pruner.total_sparsity > 0
    pruner.probe(True)
    model(input_ids=TOKENS[:1])
    before = {layer.name: (layer.mode, layer.probe_block_size, layer.statistics) for layer in layers}
    seen = look_at(model, lambda tokens: model(input_ids=tokens), layers, TOKENS, (8, 8))
    assert model.training
    for layer in layers:
        assert (layer.mode, layer.probe_block_size, layer.statistics) == before[layer.name]
        torch.testing.assert_close(seen[layer.name].sums, wanted[layer.name].sums, rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[layer.name].counts, wanted[layer.name].counts)
        assert seen[layer.name].kinds == ("max",)


def test_passages_are_copied_from_before_into_the_second_half():
    text = torch.arange(400).view(2, 200)
    repeated = repeat_passages(text, 1, seed=3)
    assert torch.equal(repeated[:, :100], text[:, :100])
    for row, original in zip(repeated, text, strict=True):
        later = row[100:]
        assert (later < original[100]).any()
        assert set(later.tolist()) <= set(original.tolist())
        # Copies run on: nearly every token is followed by its successor.
        assert (later[1:] == later[:-1] + 1).float().mean() > 0.9
    assert torch.equal(repeat_passages(text, 2, seed=3)[1], text[1])
