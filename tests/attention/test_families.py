"""A family is one file and a name in a list. The list in CONTRIBUTING is followed."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule
from sparse_prune.attention import access, attach, detach, handle_of, list_layers
from sparse_prune.attention.families import FAMILIES
from sparse_prune.attention.handles import FoundLayer
from sparse_prune.attention.trial_run import describe
from sparse_prune.kernels import AttentionOptions
from support.nano import CausalSelfAttention


def plain(query, key, value):
    """Attention written out, which no other family reaches."""
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    return (query @ key.mT * query.shape[3] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ value


class ToyAttention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.qkv, self.heads, self.function = nn.Linear(width, 3 * width), heads, plain

    def forward(self, x):
        parts = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.function(*parts).transpose(1, 2).flatten(2)


class Toy:
    """What a file `attention/toy.py` would hold."""

    KIND = "toy"

    def candidates(self, modules):
        return [name for name, module in modules.items() if isinstance(module, ToyAttention)]

    def refused(self, name, module):
        return "an odd number of heads" if module.heads % 2 else None

    @contextmanager
    def observing(self, model):
        calls, toys = {}, {n: m for n, m in model.named_modules() if isinstance(m, ToyAttention)}
        for name, toy in toys.items():
            toy.function = lambda *given, name=name: (
                calls.setdefault(name, [describe(*given, is_causal=True)]) and (plain(*given))
            )
        yield calls
        for toy in toys.values():
            toy.function = plain

    def find(self, modules, names, calls):
        for name in names:
            heads, problem = modules[name].heads, self.refused(name, modules[name])
            seen = calls is not None and name in calls
            yield FoundLayer(name, self.KIND, modules[name], heads, heads, True, problem=problem, seen=seen)

    def attach(self, model, layers):
        for layer in layers:
            handle = handle_of(layer.module)
            layer.module.function = lambda q, k, v, handle=handle: handle.attend(
                q, k, v, AttentionOptions(), dense=lambda: plain(q, k, v), causal=True
            )

    def detach(self, model):
        for module in model.modules():
            if isinstance(module, ToyAttention):
                module.function = plain


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(access, "FAMILIES", [*FAMILIES, Toy()])
    torch.manual_seed(0)
    return nn.Sequential(CausalSelfAttention(32, 4), ToyAttention(), ToyAttention(32, 1))


def test_a_new_family_is_found_attached_pruned_and_detached(toys, caplog):
    x = torch.randn(2, 24, 32)
    wanted = toys(x)
    assert [(layer.kind, layer.seen, layer.problem) for layer in list_layers(toys, x)] == [
        ("sdpa", True, None),
        ("toy", True, None),
        ("toy", True, "an odd number of heads"),
    ]
    handles = attach(toys, x)
    assert "'2': an odd number of heads" in caplog.text
    assert attach(toys, x) == handles
    assert torch.equal(toys(x), wanted)
    keep = torch.eye(3, dtype=torch.bool).expand(4, -1, -1)
    handles[1].pattern, handles[1].mode = BlockPattern(keep, (8, 8), True, 24, 24), "masked"
    assert not torch.allclose(toys(x), wanted)
    detach(toys)
    assert torch.equal(toys(x), wanted)


def test_a_pruner_takes_a_new_family(toys):
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=8)
    pruner.attach(toys)
    pruner.probe(True)
    toys(torch.randn(2, 24, 32)).sum().backward()
    pruner.update(1)
    assert 0 < pruner.patterns["1"].sparsity < 1


def test_a_module_belongs_to_the_first_family_that_claims_it(toys):
    class Greedy(Toy):
        KIND = "greedy"

        def candidates(self, modules):
            return list(modules)

        def refused(self, name, module):
            return "all mine"

        def find(self, modules, names, calls):
            return iter([FoundLayer(name, self.KIND, modules[name], problem="all mine") for name in names])

    access.FAMILIES.insert(0, Greedy())
    assert {layer.kind for layer in list_layers(toys)} == {"greedy"}
