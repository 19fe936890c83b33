import copy

import pytest
import torch
from torch import nn

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule
from sparse_prune.attention import apply_patterns, attach
from sparse_prune.export import load_patterns, save_patterns
from support.nano import NanoGPT


@pytest.fixture
def pruned():
    """A pruned model, tokens, and the pruner."""
    torch.manual_seed(0)
    model, tokens = NanoGPT(), torch.randint(16, (2, 32))
    pruner = AttentionPruner(ConstantSchedule(final=0.4), block_size=4)
    pruner.attach(model)
    pruner.probe(True)
    model.train()(tokens)
    pruner.update(1)
    return model.eval(), tokens, pruner


def test_patterns_of_a_file_go_on_a_fresh_model(pruned, tmp_path):
    model, tokens, pruner = pruned
    path = save_patterns(pruner.patterns, tmp_path / "patterns.safetensors")
    fresh = NanoGPT().eval()
    fresh.load_state_dict(model.state_dict())
    dense = fresh(tokens)
    layers = apply_patterns(fresh, load_patterns(path))
    assert [layer.name for layer in layers] == list(pruner.patterns)
    assert {(layer.mode, layer.backend) for layer in layers} == {("sparse", "gather")}
    torch.testing.assert_close(fresh(tokens), model(tokens))
    assert not torch.allclose(fresh(tokens), dense)


def test_layers_that_keep_everything_or_are_not_named_stay_dense(pruned):
    patterns = dict(pruned[2].patterns)
    first, second = patterns
    whole = patterns.pop(first)
    fresh = NanoGPT()
    apply_patterns(fresh, patterns, backend="sdpa")
    handles = {handle.name: handle for handle in attach(fresh)}
    assert (handles[first].mode, handles[first].pattern) == ("dense", None)
    assert (handles[second].mode, handles[second].backend) == ("sparse", "sdpa")
    dense = BlockPattern.dense(whole.num_heads, 32, 32, 4, causal=True)
    apply_patterns(fresh, {first: dense})
    assert handles[first].mode == "dense"


class Wrapped(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, NanoGPT())


def test_patterns_whose_names_differ_by_a_prefix_fit_and_the_log_says_so(pruned, caplog):
    patterns = pruned[2].patterns
    wrapped = {f"net.{name}": pattern for name, pattern in patterns.items()}
    with caplog.at_level("INFO"):
        bare = apply_patterns(NanoGPT(), wrapped)
    assert [layer.name for layer in bare] == list(patterns)
    assert "'net....' are matched with layers '...'" in caplog.text
    for given, model in ((patterns, Wrapped("net")), (wrapped, Wrapped("model"))):
        layers = apply_patterns(model, given)
        for layer, pattern in zip(layers, given.values(), strict=True):
            assert layer.name.endswith(tuple(patterns))
            assert layer.pattern is pattern
    with pytest.raises(ValueError, match="in 2 ways, by the prefixes"):
        apply_patterns(nn.ModuleList([NanoGPT(), NanoGPT()]), patterns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, pattern: {f"model.{name}": pattern}, "they name layers"),
        (lambda name, pattern: {name: BlockPattern.dense(3, 32, 32, 4, causal=True)}, "heads"),
        (lambda name, pattern: {name: BlockPattern.dense(4, 32, 32, 4, causal=False)}, "causal"),
    ],
)
def test_patterns_of_another_model_change_nothing(pruned, change, message):
    first, second = pruned[2].patterns
    fresh = NanoGPT()
    wrong = {first: pruned[2].patterns[first]} | change(second, pruned[2].patterns[second])
    with pytest.raises(ValueError, match=f"The patterns are of another model.*{message}"):
        apply_patterns(fresh, wrong)
    assert all(handle.pattern is None for handle in attach(fresh))
    with pytest.raises(ValueError, match="`backend` must be one of"):
        apply_patterns(copy.deepcopy(fresh), {}, backend="fast")
