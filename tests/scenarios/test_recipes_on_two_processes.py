"""The causal_lm recipe on two processes over gloo decides and reports as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sparse_prune.attention import attach
from sparse_prune.export import load, load_patterns
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model
from support.settings import pruning_callbacks, run_settings

LENGTH = 128
ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RECIPE = ["-m", "sparse_prune.recipes.causal_lm"]
FAILING = [str(Path(__file__).with_name("failing_run.py"))]
DDP = ["--trainer.devices=2", "--data.batch_size=1", "--trainer.strategy=ddp"]
SHARDED = [*DDP[:2], "--trainer.strategy=pytorch_lightning.strategies.ModelParallelStrategy"]
SHARDED += ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"]


@pytest.fixture(scope="module")
def sharp_model(tiny_model, tmp_path_factory):
    """A random model whose attention hangs on what it reads."""
    model = load_model(tiny_model)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    folder = str(tmp_path_factory.mktemp("sharp"))
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def choices(sharp_model, tmp_path_factory):
    """Model and data. One process takes two sequences a step, two take one each: the same batches."""
    text = tmp_path_factory.mktemp("text")
    for index in range(200):
        (text / f"{index}.txt").write_text(f"{index * 37 % 100:02d} of one, {index % 7} of the other. " * 8)
    counts = {"train_sequences": 40, "val_sequences": 2, "test_sequences": 3}
    data = {"text": str(text), "context_length": LENGTH, "batch_size": 2} | counts
    return {"model": sharp_model, "learning_rate": 1e-5}, data


def start(folder, model, data, *more, launcher=ALONE, program=RECIPE, **settings):
    """A finished run; the last of its processes has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    found = run_settings(folder, model, data, pruning_callbacks(block=16, final=0.4, patience=2))
    found["trainer"] |= {"limit_val_batches": 0, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(found))
    command = [*launcher, *program, "fit", "--config", str(folder / "config.yaml"), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=folder)


def fit(folder, *given, **options):
    """Patterns of a run, and what it printed."""
    done = start(folder, *given, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return load_patterns(folder / "attention_pattern.safetensors"), done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(choices, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("alone"), *choices)[0]


def same_blocks(one, other):
    """Smallest share of a layer's blocks that two runs decided alike."""
    assert one.keys() == other.keys()
    return min(float((one[name].keep == other[name].keep).float().mean()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "fsdp2"])
def test_two_compiled_processes_decide_as_one(choices, alone, tmp_path, strategy):
    # The KV cache, which is not the question here, would be compiled for a minute.
    patterns, _ = fit(tmp_path / "two", *choices, *strategy, "--model.compile=true", program=FAILING)
    # Sums in another order, and compiled arithmetic, may tip a block at the threshold.
    assert same_blocks(patterns, alone) > 0.98
    assert all(pattern.sparsity > 0.2 for pattern in patterns.values())
    assert "- 2 processes: step times and training losses are those of the first." in report(tmp_path / "two", "md")


@pytest.mark.slow
def test_other_batches_decide_otherwise(choices, alone, tmp_path):
    """The bound above tells runs apart."""
    model, data = choices
    assert same_blocks(fit(tmp_path / "other", model, data | {"seed": 5})[0], alone) < 0.97


def report(folder, kind="json"):
    text = (folder / f"report.{kind}").read_text()
    return json.loads(text) if kind == "json" else text


def mean_loss(model, sequences):
    with torch.no_grad():
        return sum(float(model(input_ids=one[None], labels=one[None]).loss) for one in sequences) / len(sequences)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "launcher"), [(DDP, ALONE), (SHARDED, TORCHRUN)], ids=["ddp", "fsdp2"])
def test_two_processes_report_compare_and_export(choices, tmp_path, strategy, launcher):
    """Three test sequences on two processes: one of them would be counted twice."""
    whole = ["--trainer.strategy.save_distributed_checkpoint=false"] if strategy is SHARDED else []
    options = ["--compare_dense=true", f"--export={tmp_path / 'export'}", "--trainer.enable_checkpointing=true"]
    saver = {"dirpath": str(tmp_path), "filename": "end", "every_n_train_steps": 8}
    callbacks = [
        *pruning_callbacks(block=16, final=0.4, patience=2),
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": saver},
    ]
    folder, (model, data) = tmp_path / "two", choices
    more = {"launcher": launcher, "callbacks": callbacks}
    patterns, output = fit(folder, model, data, *strategy, *whole, *options, **more)

    exported, trained = load(tmp_path / "export"), load_model(model["model"]).eval()
    dense_loss = mean_loss(trained, sequences := held_out(model, data))
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"]
    trained.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    for handle in attach(trained):
        handle.pattern, handle.mode, handle.backend = patterns[f"model.{handle.name}"], "sparse", "gather"
    assert torch.equal(exported(input_ids=sequences).logits, trained(input_ids=sequences).logits)

    found = report(folder)
    assert found["loss"] == pytest.approx(mean_loss(exported, sequences), rel=1e-5)
    assert found["dense"]["loss_before"] == pytest.approx(dense_loss, rel=1e-5)
    assert len(found["records"]) == len(found["dense"]["records"]) == 8
    assert found["records"][0]["loss"] == pytest.approx(found["dense"]["records"][0]["loss"], rel=1e-5)
    assert found["setup"]["processes"] == 2
    assert found["setup"]["effective batch"].startswith("2 examples per optimizer step")
    left_out = "The KV cache and decoding were not measured, because FSDP2 shards the model"
    assert (found["cache"] is None) == (left_out in report(folder, "md")) == (strategy is SHARDED)
    assert output.count(f"Report: {folder / 'report.md'}") == 1


def held_out(model, data):
    """Test sequences, int64, (3, LENGTH)."""
    found = TextDataModule(model["model"], **data)
    found.setup("test")
    return found.sequences["test"]


@pytest.mark.slow
def test_an_export_that_fails_on_rank_0_ends_both(choices, tmp_path):
    program = tmp_path / "full_disk.py"
    program.write_text(
        "import errno\n"
        "from sparse_prune.recipes.causal_lm.cli import main\n"
        "from sparse_prune.export import model\n"
        "def fail(*args):\n"
        "    raise OSError(errno.ENOSPC, 'no space left')\n"
        "model.save_patterns = fail\n"
        "main()\n"
    )
    export = f"--export={tmp_path / 'export'}"
    done = start(tmp_path / "two", *choices, *DDP, export, program=[str(program)], max_steps=2)
    assert done.returncode != 0
    assert "Rank 1 stops because rank 0 failed (see its log): OSError: [Errno 28]" in done.stderr
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "two" / "report.md").exists()


@pytest.mark.slow
def test_what_fails_on_one_rank_leaves_a_report_and_no_rank_waiting(choices, tmp_path):
    done = start(tmp_path / "two", *choices, *DDP, "--compare_dense=true", program=FAILING, max_steps=2)
    assert done.returncode != 0
    assert "The report lacks the KV cache, because measuring it failed." in done.stderr
    assert "RuntimeError: no room on rank 1" in done.stderr
    found = report(tmp_path / "two")
    assert found["loss"] > 0
    assert found["cache"] is found["dense"] is None
