"""Windows that are the same in a layer become the architecture's own, and plain transformers computes the same."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule, Constraints
from sparse_prune.attention import apply_patterns, attach
from sparse_prune.export import load, save_pretrained, with_layer_types

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 50, (2, 100), generator=torch.Generator().manual_seed(1))
FULL_AND_WINDOWS = ["qwen2", "qwen3", "gemma2", "ministral"]


def make(kind):
    own = {"layer_types": ["full_attention"] * 3} if kind in [*FULL_AND_WINDOWS, "gemma3_text", "cohere2"] else {}
    config = AutoConfig.for_model(kind, **SMALL, **own)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().double()


def band(blocks, sinks=0, block=8, length=64):
    row, col = torch.arange(length // block)[:, None], torch.arange(length // block)
    keep = (row - col < blocks) | (col < sinks)
    return BlockPattern(keep.expand(4, -1, -1).clone(), (block, block), True, length, length)


def windowed(model, widths=(2, None, 2)):
    names = [layer.name for layer in attach(model)]
    apply_patterns(model, {name: band(width) for name, width in zip(names, widths, strict=True) if width})
    return model


def own_window(model, tokens, window_layers):
    """Logits of dense eager attention under masks that are made here."""
    length = IDS.shape[1]
    place = torch.arange(length)
    causal = place[:, None] >= place
    window = causal & (place[:, None] - place < tokens)
    hooks = []
    for index, layer in enumerate(model.model.layers):
        mask = window if index in window_layers else causal

        def put(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": torch.where(mask, 0.0, -torch.inf)[None, None].double()}

        hooks.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    with torch.no_grad():
        logits = model(IDS).logits
    for hook in hooks:
        hook.remove()
    return logits


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
torch.save(model(torch.load(sys.argv[2]), use_cache=False).logits.detach(), sys.argv[3])
assert "sparse_prune" not in sys.modules
"""


@torch.no_grad()
@pytest.mark.parametrize("kind", [*FULL_AND_WINDOWS, "mistral"])
def test_plain_transformers_gives_our_outputs(kind, tmp_path):
    widths = (2, 2, 2) if kind == "mistral" else (2, None, 2)
    model = with_layer_types(windowed(make(kind), widths))
    save_pretrained(model, tmp_path / "export")
    told = json.loads((tmp_path / "export" / "config.json").read_text())
    assert told["sliding_window"] == 16
    if kind != "mistral":
        assert told["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    close = {"rtol": 0, "atol": 1e-5 if kind == "gemma2" else 1e-9}  # eager attention has a softmax in float32
    torch.save(IDS, tmp_path / "ids.pt")
    call = [sys.executable, "-c", PLAIN, tmp_path / "export", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run(call, check=True, capture_output=True)
    plain = torch.load(tmp_path / "logits.pt")
    ours = model(IDS, use_cache=False).logits
    torch.testing.assert_close(ours, plain, **close)
    torch.testing.assert_close(load(tmp_path / "export")(IDS, use_cache=False).logits, ours, **close)
    mask = own_window(make(kind), 16, [i for i, width in enumerate(widths) if width])
    torch.testing.assert_close(plain, mask, **close)
    assert not torch.allclose(plain, make(kind)(IDS).logits, atol=1e-2)  # the windows matter here


def test_parameters_are_those_of_the_model():
    model = windowed(make("qwen2"))
    twin = with_layer_types(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "patterns", "message"),
    [
        ("llama", [band(2), None, band(2)], "`sliding_window`"),
        ("mistral", [band(2), None, band(2)], r"full layer 'model.layers.1.self_attn'"),
        ("qwen2", [band(2), None, band(3)], "one width"),
        ("qwen2", [band(2), None, band(2, sinks=1)], r"'model.layers.2.self_attn' must be a window without sinks"),
        ("gemma3_text", [band(2), None, band(2)], "rotary"),
        ("cohere2", [band(2), None, band(2)], "rotary"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(kind, patterns, message):
    model = make(kind)
    names = [layer.name for layer in attach(model)]
    apply_patterns(model, {name: p for name, p in zip(names, patterns, strict=True) if p is not None})
    with pytest.raises(ValueError, match=message):
        with_layer_types(model)


def test_heads_that_differ_are_refused_by_name():
    model = windowed(make("qwen2"))
    handle = attach(model)[2]
    keep = handle.pattern.keep.clone()
    keep[3] = True
    apply_patterns(model, {handle.name: BlockPattern(keep, (8, 8), True, 64, 64)})
    with pytest.raises(ValueError, match=r"layer 'model.layers.2.self_attn'.*everything for head 3"):
        with_layer_types(model)


def test_pruning_whole_layers_gives_what_can_be_said():
    model = make("qwen2").float().train()
    constraints = Constraints(far_field="layer", sink_blocks=0, recent_blocks=2)
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=8, constraints=constraints)
    pruner.attach(model)
    pruner.probe(True)
    model(IDS[:, :64])
    pruner.probe(False)
    pruner.update(1)
    kept = [state.layer.pattern.sparsity > 0 for state in pruner.layers.values()]
    assert 0 < sum(kept) < 3
    kinds = with_layer_types(model).config.layer_types
    assert kinds == ["sliding_attention" if pruned else "full_attention" for pruned in kept]
