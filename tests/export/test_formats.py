"""Heads in the files of other programs: written, read, and held against masks that are made here."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule, Constraints
from sparse_prune.attention import apply_patterns, attach, detach
from sparse_prune.export import DuoAttention, KVPress
from support.families import SMALL

IDS = torch.randint(3, 50, (2, 64), generator=torch.Generator().manual_seed(1))
LAYERS = [f"model.layers.{index}.self_attn" for index in range(2)]


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval().double()


def heads(full, sinks=1, recent=2):
    """A pattern of four query heads, two KV heads."""
    row, col = torch.arange(8)[:, None], torch.arange(8)
    keep = ((row - col < recent) | (col < sinks)) | torch.tensor(full).repeat_interleave(2)[:, None, None]
    return BlockPattern(keep, (8, 8), True, 64, 64)


def pruned():
    model = llama()
    apply_patterns(model, {LAYERS[0]: heads([True, False]), LAYERS[1]: heads([False, False])})
    return model


@torch.no_grad()
def own_mask_logits(full, sink, recent):
    """Eager attention in which query blocks of 8 see sinks and the last blocks that `recent` tokens fill."""
    model, place = llama(), torch.arange(64)
    causal = place[:, None] >= place
    streaming = causal & ((place < sink) | (place[:, None] // 8 - place // 8 < recent // 8))
    for row, layer in zip(full, model.model.layers, strict=True):
        mask = torch.stack([causal if kept else streaming for kept in np.repeat(row, 2)])[None]

        def put(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        layer.self_attn.register_forward_pre_hook(put, with_kwargs=True)
    return model(IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("form", [DuoAttention(), KVPress()], ids=["duo", "kvpress"])
def test_what_is_written_is_read_and_computes_the_same(form, tmp_path):
    model = pruned()
    form.write(model, tmp_path)
    expected = own_mask_logits([[True, False], [False, False]], 8, 16)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-9, atol=1e-9)
    other = llama()
    patterns = form.read(tmp_path, other, length=64, block_size=8)
    assert all(patterns[layer.name].equals(layer.pattern) for layer in attach(model))
    apply_patterns(other, patterns)
    torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_duo_attention_reads_its_own_files(tmp_path):
    """A table and the part of a config as its repository holds them: trained gates, tabs, sizes in tokens."""
    table = "-9.584426879882812500e-05\t5.585937500000000000e-01\n4.277343750000000000e-01\t1.000000000000000000e+00\n"
    (tmp_path / "full_attention_heads.tsv").write_text(table)
    (tmp_path / "config.json").write_text('{"lr": 0.02, "sink_size": 128, "recent_size": 256, "threshold": 0.5}')
    patterns = DuoAttention().read(tmp_path, llama(), length=1024)
    assert patterns[LAYERS[0]].keep[:, -1].long().tolist() == [[1, 0, 0, 0, 0, 0, 1, 1]] * 2 + [[1] * 8] * 2
    assert DuoAttention(threshold=0.4).read(tmp_path, llama(), length=1024).keys() == {LAYERS[0]}


def test_files_are_those_that_the_programs_read(tmp_path):
    DuoAttention().write(pruned(), tmp_path)
    assert np.loadtxt(tmp_path / "full_attention_heads.tsv", delimiter="\t").tolist() == [[1, 0], [0, 0]]
    assert json.loads((tmp_path / "config.json").read_text()) == {"sink_size": 8, "recent_size": 16}
    KVPress().write(pruned(), tmp_path)
    held = json.loads((tmp_path / "kvpress.json").read_text())
    assert held == {"sink_size": 8, "recent_size": 16, "streaming_mask": [[0, 1], [1, 1]]}


@pytest.mark.parametrize("full", [[[True, False], [False, False]], [[True, True], [False, True]]])
def test_duo_attention_takes_these_heads_for_full_at_the_share_that_streams(full, tmp_path):
    """Its programs break ties by noise, and cut at a quantile (`duo_attn.utils.sparsify_attention_heads`)."""
    model = llama()
    apply_patterns(model, {name: heads(row) for name, row in zip(LAYERS, full, strict=True)})
    DuoAttention().write(model, tmp_path)
    values = np.loadtxt(tmp_path / "full_attention_heads.tsv", dtype=float, delimiter="\t").clip(0, 1)
    noisy = values + np.random.default_rng(0).uniform(0, 1e-6, values.shape)
    assert (noisy >= np.quantile(noisy, 1 - values.mean())).tolist() == full


def test_the_documented_press_takes_the_file(tmp_path, monkeypatch):
    """kvpress 0.5.5 asks a press for its heads by `post_init_from_model`, when it is put around a model."""

    @dataclass
    class DuoAttentionPress:
        head_compression_ratio: float = 0.0

    kvpress = ModuleType("kvpress")
    kvpress.DuoAttentionPress = DuoAttentionPress
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    names = {}
    exec(re.search(r"```py\n((?:(?!```).)*DuoAttentionPress.*?)```", text, re.DOTALL)[1], names)
    KVPress().write(pruned(), tmp_path)
    press = names["PrunedHeads"](path=str(tmp_path / "kvpress.json"))
    press.post_init_from_model(llama())
    assert (press.sink_size, press.recent_size) == (8, 16)
    assert press.streaming_mask.tolist() == [[False, True], [True, True]]


@pytest.mark.skipif("KVPRESS_PYTHON" not in os.environ, reason="kvpress excludes our transformers: name its Python")
def test_kvpress_itself_computes_what_the_heads_say(tmp_path):
    KVPress().write(pruned(), tmp_path)
    llama().float().save_pretrained(tmp_path)
    script = Path(__file__).parents[1] / "scenarios" / "kvpress_run.py"
    command = [*shlex.split(os.environ["KVPRESS_PYTHON"]), script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    difference, effect = map(float, done.stdout.split()[-3::2])
    assert difference < 1e-4 < 1.0 < effect


def scattered():
    pattern = heads([False, False])
    pattern.keep[2, 5, 2] = True
    return pattern


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (scattered(), r"Layer 'model.layers.1.self_attn', head 2 must see everything, or sinks and a window"),
        (heads([False, False], recent=3), r"layer 'model.layers.1.self_attn', KV head 0"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(second, message, tmp_path):
    model = llama()
    apply_patterns(model, {LAYERS[0]: heads([True, False]), LAYERS[1]: second})
    with pytest.raises(ValueError, match=message):
        DuoAttention().write(model, tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


def test_query_heads_of_a_kv_head_must_agree(tmp_path):
    model = llama()
    keep = heads([False, False]).keep.clone()
    keep[1] = True
    apply_patterns(model, {LAYERS[0]: BlockPattern(keep, (8, 8), True, 64, 64)})
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn', head 1"):
        KVPress().write(model, tmp_path)
    detach(model)
    with pytest.raises(ValueError, match="got none"):
        KVPress().write(model, tmp_path)


def test_heads_of_another_model_are_refused(tmp_path):
    KVPress().write(pruned(), tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"KV heads of the file, \[2, 2\] by layer, got \[2, 2, 2\]"):
        KVPress().read(tmp_path, other, length=64)
    (tmp_path / "kvpress.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold files of KVPress"):
        KVPress().read(tmp_path, other, length=64)


@pytest.mark.parametrize("regrow", [True, False])
def test_pruning_whole_far_fields_gives_what_can_be_said(regrow, tmp_path):
    model = llama().float().train()
    constraints = Constraints(far_field="head", share_kv_groups=True, recent_blocks=2, regrow=regrow)
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.3), block_size=8, constraints=constraints)
    pruner.attach(model)
    for step in (1, 2):
        pruner.probe(True)
        model(IDS)
        pruner.probe(False)
        pruner.update(step)
    assert 0.1 < pruner.total_sparsity <= 0.31
    DuoAttention().write(model, tmp_path)


def test_far_field_must_be_known_and_whole():
    with pytest.raises(ValueError, match="`far_field`"):
        Constraints(far_field="row")
    with pytest.raises(ValueError, match="`min_density` must be 0"):
        Constraints(far_field="head", min_density=0.1)
