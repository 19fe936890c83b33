import json
import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule, Constraints
from sparse_prune.__main__ import main as command_line
from sparse_prune.attention import attach
from sparse_prune.cache import PatternCache
from sparse_prune.commands.evaluate.cli import evaluate, held_out, main, sparsity_of
from sparse_prune.commands.evaluate.lengths import lengths_around
from sparse_prune.commands.evaluate.report import EvaluationReport, LengthResult
from sparse_prune.evaluation import CacheCost, all_connections, cache_cost, mean_loss
from sparse_prune.evaluation.meter import wilson
from sparse_prune.export import load, save_pretrained
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.documents import split_documents
from sparse_prune.recipes.causal_lm.pretrained import load_model

LEARNED = 128


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """A tiny model with nearly all pruned but sinks and diagonal, exported."""
    model = load_model(tiny_model).eval()
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.9), block_size=8, constraints=Constraints(hysteresis=0))
    pruner.attach(model)
    pruner.probe(True)
    with torch.no_grad():
        model(tokens(LEARNED), use_cache=False)
    pruner.probe(False)
    pruner.update(step=1)
    folder = tmp_path_factory.mktemp("export") / "model"
    return str(save_pretrained(model, folder, pruner=pruner, tokenizer=load_tokenizer(tiny_model)))


def tokens(length, count=2):
    return torch.randint(2, 98, (count, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("chunk", [1000, 50])
@torch.no_grad()
def test_loss_through_the_cache_is_the_loss_of_the_masked_model(exported, chunk):
    model, ids = load(exported), tokens(257)
    expected = sum(float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in ids) / 2
    assert mean_loss(model, ids, lambda: PatternCache(model), chunk) == pytest.approx(expected, rel=1e-5)
    with all_connections(model):
        everything = mean_loss(model, ids, DynamicCache, chunk)
        direct = sum(float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in ids) / 2
    assert everything == pytest.approx(direct, rel=1e-5)
    assert abs(everything - expected) > 1e-5
    assert mean_loss(model, ids, lambda: PatternCache(model), chunk) == pytest.approx(expected, rel=1e-5)


def test_bytes_are_those_of_keys_and_values(exported):
    model, sequence = load(exported), tokens(256)[0]
    with all_connections(model):
        cost = cache_cost(model, sequence, DynamicCache, decode=2)
    assert cost.kv_bytes == 2 * 2 * 2 * 256 * 8 * 4  # keys and values, layers, KV heads, tokens, head_dim, float32
    small = cache_cost(model, sequence, lambda: PatternCache(model), decode=2, chunk=100)
    assert small.kv_bytes < cost.kv_bytes / 4
    assert small.decode_tokens_per_s > 0


def test_lengths_stand_around_the_learned_one(exported, tiny_model):
    model = load(exported)
    assert lengths_around(model) == [64, 128, 256, 512]
    model.config.max_position_embeddings = 300
    assert lengths_around(model) == [64, 128, 256]
    with pytest.raises(ValueError, match="`lengths`"):
        lengths_around(load_model(tiny_model))
    assert 0.7 < sparsity_of(model) < 0.95
    with all_connections(model):
        assert sparsity_of(model) == 0
    assert sparsity_of(load_model(tiny_model)) == 0


def learned_positions(kind):
    """A model with a table of 256 positions and patterns that keep everything."""
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=98, n_embd=16, n_layer=2, n_head=2, n_positions=256))
    else:
        sizes = {"vocab_size": 98, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 2}
        model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=256))
    for handle in attach(model.eval()):
        handle.pattern = BlockPattern.dense(2, 256, 256, 32, True)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_lengths_leave_room_to_decode_in_a_table_of_positions(tiny_model, monkeypatch, kind):
    monkeypatch.setattr("sparse_prune.evaluation.measures.live_bytes", lambda device: 0)  # takes seconds
    model, settings = learned_positions(kind), {"depths": [0.5], "prompts": 0, "decode": 4}
    lengths = lengths_around(model, decode=4)
    assert lengths == [128, 251]
    results = evaluate(model, load_tokenizer(tiny_model), tokens(251), lengths, **settings)
    assert [part.length for part in results] == lengths
    with pytest.raises(ValueError, match=r"`lengths` must be at most 251, got 256: .* table of 256 positions"):
        evaluate(model, load_tokenizer(tiny_model), tokens(256), [128, 256], **settings)
    with pytest.raises(ValueError, match="`decode` must be at most 253"):
        lengths_around(model, decode=300)


@pytest.mark.parametrize(
    ("lengths", "depths", "named"),
    [([256, 40], [0.5], "`length` must be at least "), ([256], [1.5], "`depth` must lie")],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_measured(tiny_model, monkeypatch, lengths, depths, named):
    monkeypatch.setattr("sparse_prune.commands.evaluate.cli.mean_loss", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match=named):
        evaluate(load_model(tiny_model).eval(), load_tokenizer(tiny_model), tokens(256), lengths, depths, prompts=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--prompts -1", "--prompts: must be at least 0, got -1"),
        ("--depths 0.5 1.5", "--depths: must lie in [0, 1], got 1.5"),
        ("--depths -0.5", "--depths: must lie in [0, 1], got -0.5"),
        ("--dtype bf16", "--dtype: invalid choice: 'bf16'"),
        ("--decode 0", "--decode: must be at least 1, got 0"),
        ("--lengths 0", "--lengths: must be at least 2, got 0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named, capsys):
    with pytest.raises(SystemExit):
        main(["model", *options.split()])
    assert named in capsys.readouterr().err


def test_files_are_held_out_whole_and_collections_by_their_split(tiny_model, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(tiny_model)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 99)
    everything, part = held_out(tokenizer, str(tmp_path), 100, 5)
    assert tokenizer.decode(everything[:, 0]).replace(" ", "") == "abc"
    assert part == "all of it; the export does not tell what it was trained on"
    assert held_out(tokenizer, str(tmp_path / "b.txt"), 50, 5)[0].shape == (2, 50)
    with pytest.raises(ValueError, match=r"at least 301 tokens to evaluate on, got 300\. .*`lengths`"):
        held_out(tokenizer, str(tmp_path), 301, 1)
    documents = {str(index): f"{index:03d}" for index in range(300)}
    monkeypatch.setattr("sparse_prune.recipes.causal_lm.documents.load_documents", lambda text: documents)
    splits = split_documents(documents)
    ids, part = held_out(tokenizer, "stdlib", 4, 300)
    assert [tokenizer.decode(part[:3]).replace(" ", "") for part in ids] == splits["test"]
    assert part == "of stdlib the part that causal_lm holds out"
    assert 10 < len(splits["test"]) < 60


def test_evaluate_of_a_plain_model_needs_no_patterns(tiny_model):
    model = load_model(tiny_model).eval()
    (result,) = evaluate(model, load_tokenizer(tiny_model), tokens(200), [100], [0.5], prompts=0, decode=1)
    assert result.passkey == []
    assert result.loss == pytest.approx(mean_loss(model, tokens(200).view(4, 100), DynamicCache), rel=1e-5)


def result(length, loss, kv, rate):
    return LengthResult(length, loss, [1.0, 0.5], [], CacheCost(kv, rate, rate))


def test_report_puts_dense_beside_pruned(tmp_path):
    report = EvaluationReport(
        {"model": "m"}, 0.5, (0.1, 0.9), [result(64, 1.0, 4 << 20, 10.0)], [result(64, 1.1, 1 << 20, 5.0)]
    )
    (ratio,) = report.ratios()
    assert ratio["kv_bytes"] == 4
    assert ratio["decode"] == 0.5
    assert ratio["perplexity_rise"] == pytest.approx(0.1052, abs=1e-4)
    text = report.write(tmp_path).read_text()
    assert "| 64 | 2.718 / 3.004 (+10.52%) | 75% / 75% | - / - | 4.00 / 1.00 (4.00x smaller) |" in text
    assert "| passkey | 64 | 100% / 100% | 50% / 50% |" in text


@pytest.mark.parametrize("twin", [False, True])
def test_command_writes_table_data_and_picture(exported, tiny_model, tmp_path, monkeypatch, capsys, twin):
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(f"number {index}" for index in range(30)))
    options = f"{exported} --text {text} --lengths 128 256 --sequences 1 --depths 0.5 --prompts 1 --decode 2"
    options += f" --output {output} --device cpu" + (f" --dense {tiny_model}" if twin else "")
    monkeypatch.setattr(sys, "argv", ["sparse-prune", "evaluate", *options.split()])
    command_line()
    data = json.loads((output / "evaluation.json").read_text())
    assert [part["length"] for part in data["pruned"]] == [128, 256]
    # The tiny model was not trained: the twin that is loaded again is the dense model itself.
    assert data["dense"][1]["loss"] != data["pruned"][1]["loss"]
    assert data["ratios"][1]["kv_bytes"] > 3
    assert data["setup"]["dense model"] == (tiny_model if twin else "the same weights, nothing pruned")
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "evaluation.md").read_text()
    assert f"({data['ratios'][1]['kv_bytes']:.2f}x smaller)" in table
    assert table.splitlines()[4] in capsys.readouterr().out


def test_tasks_are_asked_of_both(exported, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n".join(f"number {index}" for index in range(60)))
    options = f"{exported} --text {text} --lengths 400 --sequences 1 --prompts 0 --decode 2 --device cpu"
    command_line(["evaluate", *options.split(), "--output", str(output), "--tasks", "passkey", "--questions", "4"])
    (task,) = json.loads((output / "evaluation.json").read_text())["tasks"]
    assert (task["task"], task["length"]) == ("passkey", 400)
    assert task["dense"]["questions"] == task["pruned"]["questions"] == 4
    assert task["dense"]["log_prob"] != task["pruned"]["log_prob"]  # one of them has all connections
    assert task["dense"]["interval"] == pytest.approx(wilson(0, 4))  # the tiny model was not trained
    assert list(task["dense"]["by_depth"]) == ["0.1", "0.5", "0.9"]
    assert "| passkey | 0% (0% to 49%) | 0% (0% to 49%) |" in capsys.readouterr().out


def test_a_task_that_does_not_fit_is_refused_before_anything_is_measured(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparse_prune.commands.evaluate.cli.evaluate", lambda *args, **given: pytest.fail("measured"))
    (tmp_path / "text").write_text("some words " * 30)
    options = (
        f"{exported} --text {tmp_path / 'text'} --prompts 0 --lengths 128 --output {tmp_path / 'out'} --device cpu"
    )
    with pytest.raises(SystemExit) as done:
        main([*options.split(), "--tasks", "all", "--task_length", "20"])
    assert done.value.code == 2
    assert "`length` must be at least" in capsys.readouterr().err


def test_dense_twin_keeps_its_rotary_frequencies(exported, tiny_model, tmp_path, monkeypatch):
    seen = []

    def watch(model, **measure):
        seen.append({name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())})
        return [result(128, 1.0, 1, 1.0)]

    monkeypatch.setattr("sparse_prune.commands.evaluate.cli.evaluate", watch)
    (tmp_path / "text").write_text("some " * 60)
    options = f"--text {tmp_path / 'text'} --dtype bfloat16 --lengths 128 --output {tmp_path / 'out'} --device cpu"
    main(f"{exported} --dense {tiny_model} {options}".split())
    pruned, dense = seen
    assert dense == pruned
    assert dense["model.rotary_emb.inv_freq"] == torch.float32
    assert dense["lm_head.weight"] == torch.bfloat16


def test_a_type_that_is_slow_here_gives_way_unless_it_is_asked_for(exported, tmp_path, monkeypatch):
    seen = []

    def watch(model, **measure):
        seen.append(model.dtype)
        return [result(128, 1.0, 1, 1.0)]

    monkeypatch.setattr("sparse_prune.commands.evaluate.cli.evaluate", watch)
    monkeypatch.setattr("sparse_prune.precision._is_fast", lambda wanted, kind: False)
    (tmp_path / "text").write_text("some " * 60)
    save_pretrained(load(exported, dtype=torch.bfloat16), tmp_path / "half", tokenizer=load_tokenizer(str(exported)))
    options = f"--text {tmp_path / 'text'} --lengths 128 --output {tmp_path / 'out'} --device cpu"
    for more in ([], ["--dtype", "bfloat16"]):
        main([str(tmp_path / "half"), *options.split(), *more])
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_unknown_command_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        command_line(["prune"])
    assert "evaluate" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0


def test_a_missing_export_or_package_ends_in_one_line(tmp_path, monkeypatch, capsys):
    for model in ("./nothere", str(tmp_path)):
        with pytest.raises(SystemExit) as done:
            command_line(["evaluate", model])
        assert done.value.code == 2
        assert (
            f"error: `name` must be {'an existing folder' if model == './nothere' else 'a folder'}"
            in capsys.readouterr().err
        )
    for package, extra in (("huggingface_hub", "hf"), ("matplotlib", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit):
            command_line(["evaluate", "owner/pruned"])
        assert f"Run `pip install 'sparse_prune[{extra}]'`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--device nowhere", "--device: must be a device of this machine, got nowhere"),
        ("--device meta", "--device: must be a device of this machine, got meta"),
        ("--lengths 40 --prompts 1", "`length` must be at least"),
        ("--lengths 128 --output {text}", "`output` must be a folder to write into, got '{text}'"),
    ],
)
def test_what_cannot_be_done_ends_in_one_line(exported, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.setattr("sparse_prune.commands.evaluate.cli.evaluate", lambda *args, **given: pytest.fail("measured"))
    text = tmp_path / "text"
    text.write_text("some words " * 30)
    with pytest.raises(SystemExit) as done:
        main(f"{exported} --text {text} --prompts 0 {options.format(text=text)}".split())
    assert done.value.code == 2
    assert f"error: {named.format(text=text)}" in capsys.readouterr().err.replace("argument --", "--")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["model", "--device", "cuda"])
    assert "--device: must be a device of this machine, got cuda" in capsys.readouterr().err


def test_an_export_of_an_encoder_or_without_a_tokenizer_is_refused(exported, tiny_model, tmp_path, capsys):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertForMaskedLM(BertConfig(vocab_size=98, **sizes)).eval()
    (handle,) = attach(encoder)
    handle.pattern, handle.mode = BlockPattern.dense(2, 128, 128, 32, False), "sparse"
    save_pretrained(encoder, tmp_path / "encoder", tokenizer=load_tokenizer(tiny_model))
    save_pretrained(load(exported), tmp_path / "alone")
    (tmp_path / "text").write_text("some words " * 30)
    for name, error in {
        "encoder": "`model` must be a causal language model, got BertForMaskedLM",
        "alone": f"`model` must hold a tokenizer, got none from '{tmp_path / 'alone'}'. Export it with",
    }.items():
        with pytest.raises(SystemExit) as done:
            main(f"{tmp_path / name} --text {tmp_path / 'text'} --lengths 128 --prompts 0 --device cpu".split())
        assert done.value.code == 2
        assert f"error: {error}" in capsys.readouterr().err
