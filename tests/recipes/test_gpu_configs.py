"""The configurations for a GPU, run on a CPU from the first step to the report.

Everything in the shipped files stays but the accelerator, the number of steps and examples, lengths, and where model
and data come from: tiny random models of the same architectures, and folders with the same features.
"""

import csv
import json
import os
import random
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sparse_prune.export import load_patterns
from sparse_prune.precision import fast_precision
from sparse_prune.recipes.base.pretrained import load_tokenizer
from support.data_sets import write_opinions, write_pictures

pytestmark = pytest.mark.slow
STEPS = 12
PRUNING = "trainer__callbacks__init_args"  # of the last callback
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def run(tmp_path):
    """Runs a recipe in a process of its own, which knows no account and keeps its caches below `tmp_path`.

    Changes stand over the shipped configuration; two underscores stand for the dots of an option. Gives the report and
    its folder.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HF_"))}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}

    def run(recipe, name, steps=STEPS, **changes):
        options = {
            "trainer__accelerator": "cpu",
            "trainer__max_steps": steps,
            "trainer__val_check_interval": STEPS // 2,
            "trainer__log_every_n_steps": 1,
            "trainer__enable_progress_bar": "false",
            f"{PRUNING}__sparsity__init_args__begin_step": 1,
            f"{PRUNING}__sparsity__init_args__end_step": 6,
            f"{PRUNING}__every_n_steps": 1,
            f"{PRUNING}__min_delta": 0.5,
            f"{PRUNING}__patience": 1,
        }
        options |= changes
        command = [sys.executable, "-m", f"sparse_prune.recipes.{recipe}", "fit", "--config", name]
        command += [f"--{key.replace('__', '.')}={value}" for key, value in options.items()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        reports = tmp_path.glob("runs/*/csv/version_*/report.json")
        report = max(reports, key=lambda path: path.stat().st_mtime_ns)
        return json.loads(report.read_text()), report.parent

    return run


def check(report, folder, quality):
    """Everything that a configuration asks for is there."""
    assert report["setup"]["precision"] == fast_precision("cpu")
    assert len(report["records"]) == len(report["dense"]["records"]) == STEPS
    assert {event["step"] for event in report["events"]} <= set(range(STEPS + 1))
    assert len(report["events"]) == len(report["layer_sparsity"])
    assert {record["phase"] for record in report["dense"]["records"]} == {"dense"}
    assert set(report["quality"]) == set(report["dense"]["quality"]) == {quality}
    assert max(record["sparsity"] for record in report["records"]) > 0.3
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert f"step={STEPS}" in checkpoint.name
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [STEPS // 2 - 1, STEPS - 1]
    assert sum(bool(row["dense/train/loss"]) for row in rows) == STEPS
    assert len(load_patterns(folder / "attention_pattern.safetensors")) == len(report["layer_sparsity"])
    assert list(folder.parents[1].glob("wandb/offline-run-*/run-*.wandb"))
    assert len(list(folder.parents[2].iterdir())) == 1
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["compare_dense"]
    assert settings["trainer"]["devices"] == 1


def vit(folder, size):
    ViTForImageClassification(ViTConfig(image_size=size, num_labels=1000, **SIZES)).save_pretrained(folder)
    return folder


def food(folder):
    return f"hub:{write_pictures(folder, [0, 1, 2] * 15, ['waffles', 'apple_pie', 'sushi'], size=(40, 30))}"


def test_vit_at_its_384_pixels(run, tmp_path):
    data = {"data__data": food(tmp_path / "food"), "data__batch_size": 2, "data__num_workers": 2}
    report, folder = run("vision", "vit_gpu", model__model=vit(tmp_path / "vit", 384), **data)
    check(report, folder, "accuracy")
    assert report["setup"]["image and patch size"] == "384, 16"
    # The new head starts with the same weights, and so do the twins.
    assert report["records"][0]["loss"] == pytest.approx(report["dense"]["records"][0]["loss"], rel=1e-4)
    for pattern in load_patterns(folder / "attention_pattern.safetensors").values():
        assert pattern.keep.shape == (2, 10, 10)  # 577 tokens in blocks of 64


@pytest.fixture
def opinions(tmp_path):
    """Documents of three issue areas, under the names that the hub has for them: numbers, which are not their order."""
    chance = random.Random(0)
    texts = [
        "".join(chance.choices("abc" + "xyz"[index % 3] * 3, k=300 if index % 9 == 0 else 900)) for index in range(45)
    ]
    return f"hub:{write_opinions(tmp_path / 'law', texts, [0, 1, 2] * 15, ['1', '10', '9'])}:scotus"


def test_modernbert(run, tmp_path, tiny_model, opinions):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(tmp_path / "modernbert")
    sizes = {**SIZES, "num_hidden_layers": 4, "vocab_size": 98, "max_position_embeddings": 512, "pad_token_id": 0}
    config = ModernBertConfig(local_attention=16, cls_token_id=1, sep_token_id=1, **sizes)
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "modernbert")
    report, folder = run(
        "text_classification",
        "modernbert_gpu",
        model__model=tmp_path / "modernbert",
        data__data=opinions,
        data__max_length=512,
        data__batch_size=2,
        export=tmp_path / "pruned",
        **{f"{PRUNING}__block_size": 16},
    )
    check(report, folder, "accuracy")
    assert report["setup"]["classes"] == "1, 10, 9"
    assert AutoConfig.from_pretrained(tmp_path / "pruned").id2label == {0: "1", 1: "10", 2: "9"}
    assert report["records"][0]["loss"] == pytest.approx(report["dense"]["records"][0]["loss"], rel=1e-4)
    # What lies outside the windows goes first: a token of a local layer sees eight others on each side, so a block sees
    # its neighbours. The first block always stays.
    seen = (torch.arange(32)[:, None] - torch.arange(32)).abs() <= 1
    seen[:, 0] = True
    with open(folder / "metrics.csv", newline="") as file:
        first = next(row for row in csv.DictReader(file) if float(row["prune/requested"] or 0) > 0)
    outside = 1.0 - float(seen.float().mean())
    found = [float(first[f"sparsity/layer_{layer:02d}"]) for layer in range(4)]
    assert found == pytest.approx([0.0, outside, outside, 0.0], abs=1e-6)


def test_smollm2(run, tmp_path, tiny_model):
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "llama")
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 98, "max_position_embeddings": 8192}
    config = LlamaConfig(tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    report, folder = run(
        "causal_lm",
        "smollm2_8k_gpu",
        model__model=tmp_path / "llama",
        model__passkey_prompts=2,
        data__context_length=512,
        data__train_sequences=60,
        data__val_sequences=2,
        data__test_sequences=2,
        **{f"{PRUNING}__block_size": 32},
    )
    check(report, folder, "passkey accuracy")
    assert report["cache"]["pruned"]["kv_bytes"] <= report["cache"]["dense"]["kv_bytes"]


def test_listops(run):
    data = {"data__batch_size": 2, "data__train_examples": 60, "data__val_examples": 10, "data__test_examples": 10}
    data |= {"data__rules__min_length": 50, "data__rules__max_length": 250}
    model = {"model__width": 32, "model__layers": 2, "model__mlp": 32}
    report, folder = run("long_range", "listops_2k_gpu", **model, **data, **{f"{PRUNING}__block_size": 16})
    check(report, folder, "accuracy")
    assert report["setup"]["training expressions"] == 60
