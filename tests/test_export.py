import json
import os
import platform
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule, files
from sparse_prune.attention import attach
from sparse_prune.cache import PatternCache
from sparse_prune.export import (
    PATTERN_FILE,
    check_folder,
    load,
    load_patterns,
    push_to_hub,
    read_pattern_file,
    save_patterns,
    save_pretrained,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.5}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=20, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}
IDS = torch.randint(3, 50, (2, 64), generator=torch.Generator().manual_seed(1))


def patterns():
    return {
        "a": BlockPattern(torch.rand(2, 3, 5) < 0.5, (8, 4), False, 24, 20),
        "b": BlockPattern.dense(1, 9, 9, 4, True),
    }


def pruned(name="llama", seed=0, dtype=torch.float32):
    """A model with patterns, and what pruned it."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype).eval()
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=8)
    pruner.attach(model)
    pruner.probe(True)
    with torch.no_grad():
        model(IDS, use_cache=False)
    pruner.probe(False)
    pruner.update(step=1)
    return model, pruner


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def test_round_trip(tmp_path):
    saved = patterns()
    loaded = load_patterns(save_patterns(saved, tmp_path / "deep" / "p.safetensors"))
    assert loaded.keys() == saved.keys()
    for name, pattern in saved.items():
        assert torch.equal(loaded[name].keep, pattern.keep)
        for field in ("block_size", "causal", "q_len", "kv_len"):
            assert getattr(loaded[name], field) == getattr(pattern, field)


def test_truncated_foreign_missing_and_newer_files_are_refused(tmp_path):
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="pattern file"):
            load_patterns(path)
    path.write_bytes(whole.replace(b'"version":"3"', b'"version":"1"'))
    with pytest.raises(ValueError, match="version"):
        load_patterns(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="format None"):
        load_patterns(path)
    with pytest.raises(FileNotFoundError):
        load_patterns(tmp_path / "none")


def test_any_altered_byte_is_refused_or_changes_nothing(tmp_path):
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    whole, expected = path.read_bytes(), load_patterns(path)
    refused = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = load_patterns(path)
        except ValueError:
            refused += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name].keep, expected[name].keep) for name in expected)
    assert refused > 0.99 * len(whole)


def test_patterns_that_are_not_used_lie_beside_those_in_force(tmp_path):
    saved, learned = patterns(), BlockPattern.dense(2, 24, 20, (8, 4), False)
    plain = save_patterns(saved, tmp_path / "plain.safetensors")
    path = save_patterns(saved, tmp_path / "p.safetensors", unused={"a": learned})
    assert torch.equal(load_patterns(path)["a"].keep, saved["a"].keep)
    assert torch.equal(load_patterns(path, unused=True)["a"].keep, learned.keep)
    assert torch.equal(load_patterns(path, unused=True)["b"].keep, saved["b"].keep)
    assert load_patterns(plain, unused=True).keys() == saved.keys()
    assert read_pattern_file(path)[1]["unused"].keys() == {"a"}
    assert "unused" not in read_pattern_file(plain)[1]


def test_rule_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_prune.export.patterns.RULE", "none")
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="rule for other lengths 'none'"):
        load_patterns(path)


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    whole = path.read_bytes()
    failing = lambda *args: (_ for _ in ()).throw(OSError("disk full"))  # noqa: E731
    monkeypatch.setattr("sparse_prune.export.patterns.os.replace", failing)
    with pytest.raises(OSError, match="disk full"):
        save_patterns(patterns(), path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(ValueError, match="empty"):
        save_patterns({}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_loaded_model_gives_the_same_logits_bit_for_bit(tmp_path, name, dtype):
    model, pruner = pruned(name, dtype=dtype)
    first, second = pruner.layers
    pruner.layers[first].layer.mode = "sparse"
    expected, dense = logits(model), logits(AutoModelForCausalLM.from_config(model.config))
    loaded = load(save_pretrained(model, tmp_path / "model", pruner=pruner))
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded, IDS[:, :37]), logits(model, IDS[:, :37]))
    longer = IDS.repeat(1, 2)
    assert torch.equal(logits(loaded, longer), logits(model, longer))
    assert not torch.equal(dense, expected)
    assert {h.name: h.mode for h in attach(loaded)} == {first: "sparse", second: "masked"}
    assert logits(loaded.train()).shape == expected.shape
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = loaded.eval().generate(IDS, past_key_values=PatternCache(loaded), **settings)
    assert torch.equal(tokens, model.generate(IDS, past_key_values=PatternCache(model), **settings))


def test_header_tells_what_was_pruned_and_how(tmp_path):
    model, pruner = pruned()
    _, header = read_pattern_file(save_pretrained(model, tmp_path / "model", pruner=pruner) / PATTERN_FILE)
    assert header["model"] == {
        "class": "LlamaForCausalLM",
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "vocab_size": 50,
    }
    layer = header["layers"]["model.layers.0.self_attn"]
    assert layer["block_size"] == [8, 8]
    assert (layer["q_len"], layer["num_heads"]) == (64, 4)
    assert header["sparsity"] == pytest.approx(pruner.total_sparsity)
    schedule = {"final": 0.5, "initial": 0.0, "begin_step": 0, "end_step": 0}
    assert header["schedule"] == {"kind": "ConstantSchedule", "of": "sparsity", **schedule}
    assert header["pruning"]["statistic"] == "max"
    quartiles = header["scores"]["model.layers.1.self_attn"]["quartiles"]
    assert quartiles == sorted(quartiles)
    assert len(quartiles) == 5
    assert "sinks" in header["rule"]


def test_plain_transformers_reads_the_dense_model(tmp_path):
    model, _ = pruned()
    plain = AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "model"))
    assert plain.config._attn_implementation == "sdpa"
    for handle in attach(model):
        handle.mode = "dense"
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_foreign_altered_and_missing_files_are_refused(tmp_path, monkeypatch):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    other = save_pretrained(pruned(seed=1)[0], tmp_path / "other")
    copy = shutil.copytree(path, tmp_path / "copy")
    shutil.copy(other / PATTERN_FILE, copy)
    with pytest.raises(ValueError, match=r"'model.safetensors' was altered"):
        load(copy)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model.safetensors' was altered"):
        load(path)
    assert load(path, verify=False) is not None
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(Exception, match=r"(?i)safetensors|invalid|incomplete"):
        load(path, verify=False)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'model.safetensors'.*missing"):
        load(path)
    with pytest.raises(FileNotFoundError, match="existing folder"):
        load(tmp_path / "none")

    def offline(*args, **given):
        raise LocalEntryNotFoundError("ConnectError: Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"existing folder or hub repository, got 'runs/typo'") as refused:
        load("runs/typo")
    assert "ConnectError" in str(refused.value.__cause__)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=PATTERN_FILE):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="`backend`"):
        load(other, backend="fast")


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("llama", {"num_attention_heads": 8, "head_dim": 8}, r"num_attention_heads 4 there, 8 here"),
        ("llama", {"num_hidden_layers": 3}, r"num_hidden_layers 2 there, 3 here"),
        ("mistral", {}, "class 'LlamaForCausalLM' there"),
    ],
)
def test_model_of_another_shape_is_refused_with_the_difference(tmp_path, name, change, named):
    """A folder in which the patterns lie beside a model that they were not made for."""
    path = save_pretrained(pruned()[0], tmp_path / "model")
    config = {"llama": LlamaConfig, "mistral": MistralConfig}[name](**(SMALL | change))
    foreign = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[name](config)
    foreign.save_pretrained(path)
    if name == "mistral":  # its weights have the same names and shapes
        from sparse_prune.export import loading as module

        patterns, header = read_pattern_file(path / PATTERN_FILE)
        with pytest.raises(ValueError, match=named):
            module._compare("class", header["model"], module.identity(foreign))
        return
    with pytest.raises(ValueError, match=named):
        load(path, verify=False)


def test_patterns_without_a_model_are_no_export(tmp_path):
    save_patterns(patterns(), tmp_path / PATTERN_FILE)
    with pytest.raises(ValueError, match="patterns alone"):
        load(tmp_path)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="must have attention patterns"):
        save_pretrained(MODELS["llama"](), tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="new, empty or an earlier export"):
        save_pretrained(pruned()[0], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_new_export_replaces_the_old_one_and_keeps_what_others_put_there(tmp_path):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    (path / "README.md").write_text("mine")
    model, _ = pruned(seed=1)
    save_pretrained(model, path)
    assert torch.equal(logits(load(path)), logits(model))
    assert (path / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_links_and_empty_folders_of_others_stay(tmp_path):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "data").write_text("theirs")
    (path / "notes" / "empty").mkdir(parents=True)
    for name, where in {"to_folder": tmp_path / "large", "to_file": "../large/data", "broken": "nowhere"}.items():
        (path / "notes" / name).symlink_to(where)
    save_pretrained(pruned(seed=1)[0], path)
    assert sorted(os.listdir(path / "notes")) == ["broken", "empty", "to_file", "to_folder"]
    assert (path / "notes" / "to_folder").readlink() == tmp_path / "large"
    assert os.readlink(path / "notes" / "to_file") == "../large/data"
    assert (path / "notes" / "to_folder" / "data").read_text() == "theirs"


def test_permissions_stay(tmp_path):
    (tmp_path / "model").mkdir(mode=0o700)
    for _ in range(2):  # into the empty folder, and over an earlier export
        assert save_pretrained(pruned()[0], tmp_path / "model").stat().st_mode & 0o777 == 0o700


def test_home_is_the_same_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check_folder("~/model")
    assert save_pretrained(pruned()[0], "~/model") == (tmp_path / "model").resolve()
    assert load("~/model") is not None
    check_folder("~/model")


def test_a_run_s_folder_is_no_earlier_export(tmp_path):
    save_patterns(patterns(), tmp_path / PATTERN_FILE)
    (tmp_path / "metrics.csv").write_text("step,loss")
    for refuse in (check_folder, lambda folder: save_pretrained(pruned()[0], folder)):
        with pytest.raises(ValueError, match="new, empty or an earlier export"):
            refuse(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [PATTERN_FILE, "metrics.csv"]


def test_a_place_that_cannot_be_replaced_is_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(files.os.path, "ismount", lambda path: path == tmp_path / "volume")
    monkeypatch.chdir(tmp_path / "volume")
    for place, reason in ((".", "the working folder is"), ("..", r"new, empty|the working folder is")):
        with pytest.raises(ValueError, match=reason):
            check_folder(place)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"`export` must be a folder that .*volume': it is a mount point\. Name a folder"
    ):
        check_folder("volume", "export")
    with pytest.raises(ValueError, match=r"'/proc/pruned': .*/proc/"):  # where nobody may write
        check_folder("/proc/pruned")
    check_folder("volume/new/pruned")
    check_folder("new/pruned")
    assert os.listdir(tmp_path) == ["volume"]
    assert not os.listdir(tmp_path / "volume")


def test_what_killed_exports_left_is_removed(tmp_path):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    machine = platform.node()
    others = [f".model.{machine}.{os.getppid()}.partial", f".model.elsewhere.{child}.partial", f".model.{child}.mine"]
    for name in (f".model.{machine}.{child}.partial", *others):
        (tmp_path / name).mkdir()
    save_pretrained(pruned()[0], tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == sorted(["model", *others])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_to_a_folder_stays_a_link(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "large").mkdir()
    link = tmp_path / "link"
    link.symlink_to("large")
    for seed in (0, 1):  # into the empty folder, and over an earlier export
        model, _ = pruned(seed=seed)
        assert torch.equal(logits(load(save_pretrained(model, link))), logits(model))
        assert torch.equal(logits(load(link)), logits(model))
        assert link.is_symlink()
        assert (tmp_path / "large" / PATTERN_FILE).is_file()
        assert sorted(os.listdir(tmp_path)) == ["large", "link"]


def test_a_compiled_model_is_saved_as_what_it_wraps(tmp_path):
    model, pruner = pruned()
    loaded = load(save_pretrained(torch.compile(model), tmp_path / "model", pruner=pruner))
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def start_group():
    """Starts this process's group; it is gone when the test ends."""
    yield dist.init_process_group
    dist.destroy_process_group()


def test_a_sharded_model_is_put_together(tmp_path, start_group):
    """In one process. Weights that are tied are written once, as those of a whole model."""
    start_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    model, pruner = pruned("tied")
    expected = logits(model)
    whole = save_pretrained(model, tmp_path / "whole", pruner=pruner)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    sharded = save_pretrained(torch.compile(model), tmp_path / "sharded", pruner=pruner)
    assert torch.equal(logits(load(sharded)), expected)
    assert load_file(sharded / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    assert (sharded / "config.json").read_text() == (whole / "config.json").read_text()
    assert read_pattern_file(sharded / PATTERN_FILE)[1] == read_pattern_file(whole / PATTERN_FILE)[1]


def test_only_rank_0_writes_a_whole_model(tmp_path, start_group):
    start_group("fake", rank=1, world_size=2, store=FakeStore())
    model, _ = pruned()
    assert save_pretrained(model, tmp_path / "model") == (tmp_path / "model").resolve()
    assert not os.listdir(tmp_path)


class Mine(LlamaForCausalLM):
    """A class that transformers does not know."""


class Adapted(Mine):
    """As adapters of PEFT wrap a model."""

    def merge_and_unload(self):
        raise NotImplementedError


@pytest.mark.parametrize(("kind", "remedy"), [(Mine, "save_patterns"), (Adapted, "merge_and_unload")])
def test_a_model_that_could_not_be_loaded_again_is_refused_before_anything_is_written(tmp_path, kind, remedy):
    model, _ = pruned()
    model.__class__ = kind
    with pytest.raises(ValueError, match=rf"class of transformers.*{kind.__name__}.*{remedy}"):
        save_pretrained(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


class Adapter(torch.nn.Module):
    """As `peft.inject_adapter_in_model` puts into a module."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.lora = base, torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


def adapted(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)


def adapted_and_quantized(model):
    adapted(model)
    model.config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")


def other_head(model):
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 50))


def larger_head(model):
    model.lm_head = torch.nn.Linear(32, 51, bias=False)


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def quantized(model):
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (adapted, r"none for model.layers.0.self_attn.q_proj.weight; also .*lora.bias"),
        (adapted_and_quantized, r"also model.layers.0.self_attn.q_proj.base_layer.weight"),
        (other_head, r"none for lm_head.weight; also lm_head.0.bias"),
        (larger_head, r"other shapes for lm_head.weight"),
        (normed, r"none for model.layers.1.mlp.down_proj.weight; also .*original0"),
        (tied, r"those of others for lm_head.weight"),
        (quantized, r"and 12 more; also"),
    ],
)
def test_layers_that_the_class_does_not_have_are_refused_before_anything_is_written(tmp_path, change, named):
    model, _ = pruned()
    change(model)
    with pytest.raises(ValueError, match=rf"`model` must have the weights of LlamaForCausalLM.*{named}"):
        save_pretrained(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_an_export_without_all_weights_or_with_others_is_refused(tmp_path):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of LlamaForCausalLM, got none for lm_head.weight; also head.weight"):
        load(path, verify=False)
    with pytest.raises(ValueError, match="`output_loading_info` must be left out"):
        load(path, output_loading_info=True)


def test_layers_may_share_one_pattern(tmp_path):
    model, _ = pruned()
    for handle in attach(model):
        handle.pattern = BlockPattern.dense(4, 64, 64, 8, True)
    first, second = attach(model)
    second.pattern = first.pattern
    assert torch.equal(logits(load(save_pretrained(model, tmp_path / "model"))), logits(model))


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", ["after the model", "before the swap", "within the swap", "after the swap"])
def test_crash_at_any_moment_leaves_a_whole_export(tmp_path, monkeypatch, moment, exchange):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    expected, model = logits(load(path)), pruned(seed=1)[0]
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    child = os.fork()
    if not child:  # a process that dies without any clean-up
        rename, swap, done = os.rename, files._exchange, []

        def dying_rename(*args):
            rename(*args)
            done.append(args)
            os._exit(1) if moment == "within the swap" else None

        def dying_exchange(*args):
            os._exit(1) if moment == "before the swap" else None
            swapped = swap(*args)
            os._exit(1) if swapped and moment in ("within the swap", "after the swap") else None
            return swapped

        files.os.rename, files._exchange = dying_rename, dying_exchange
        if moment == "after the model":
            import sparse_prune.export.model as module

            module.save_patterns = lambda *args: os._exit(1)
        if moment == "after the swap":
            remove = shutil.rmtree
            files.shutil.rmtree = lambda *args, **kwargs: os._exit(1) if len(done) == 2 else remove(*args, **kwargs)
        try:
            save_pretrained(model, path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    swapped = moment == "after the swap" or (exchange and moment == "within the swap")
    assert torch.equal(logits(load(path)), logits(model) if swapped else expected)
    save_pretrained(model, path)
    assert torch.equal(logits(load(path)), logits(model))


def test_failed_export_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    expected = logits(load(path))
    model, _ = pruned(seed=1)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(model, path)
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(logits(load(path)), expected)


def test_no_file_is_a_pickle(tmp_path):
    path = save_pretrained(pruned()[0], tmp_path / "model")
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".md", ".png"}
    (path / "model.safetensors").rename(path / "gone")
    torch.save(load_file(path / "gone"), path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(path, verify=False)


def test_hub_round_trip_through_its_own_library(tmp_path, monkeypatch):
    """Up to the calls that would go over the network: an upload is a copy here, and so is a download."""
    hub, calls = tmp_path / "hub", []

    class Commit:
        commit_url = "https://hub/commit"

    def upload(self, **arguments):
        calls.append(arguments)
        shutil.copytree(arguments["folder_path"], hub)
        return Commit()

    def download(repo_id, **arguments):
        calls.append({"repo_id": repo_id, **arguments})
        return str(hub)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **given: calls.append({repo: given}))
    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, pruner = pruned()
    assert push_to_hub(model, "me/small", pruner=pruner, private=True) == "https://hub/commit"
    assert torch.equal(logits(load("me/small", revision="v1")), logits(model))
    created, uploaded, downloaded = calls
    assert created == {"me/small": {"private": True, "exist_ok": True}}
    assert uploaded["repo_id"] == downloaded["repo_id"] == "me/small"
    assert downloaded["revision"] == "v1"
    assert not any("bin" in pattern or "py" in pattern for pattern in downloaded["allow_patterns"])


def test_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    path = save_pretrained(
        pruned()[0], tmp_path / "model", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a")
    )
    assert AutoTokenizer.from_pretrained(path)("b")["input_ids"] == [1]
    files = read_pattern_file(path / PATTERN_FILE)[1]["files"]
    assert "tokenizer.json" in files
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"
