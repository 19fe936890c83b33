"""A program without this library attends by the patterns of an export, through the `kernels` package."""

import os
import subprocess
import sys
from copy import copy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from sparse_prune import BlockPattern
from sparse_prune.attention import apply_patterns, attach, handle_of
from sparse_prune.export import PATTERN_FILE, load, save_kernels, save_pretrained
from sparse_prune.export.hub_attention import flash_attn_forward
from sparse_prune.kernels import AttentionOptions, block_sparse_attention

pytest.importorskip("kernels", reason="needs the `kernels` package: pip install -e '.[dev]'")

IDS = torch.randint(3, 50, (2, 100), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(9), 0)
PADDED[1] = 1

WITHOUT_US = """
import inspect, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sparse_prune":
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
export, inputs, outputs = sys.argv[1:]
import kernels
import transformers.utils.import_utils as known

# Transformers 5.23 asks for a later version of the package than the latest that was to be had.
asked = inspect.unwrap(known.is_kernels_available)
asked.__defaults__ = (min(asked.__defaults__[0], kernels.__version__), asked.__defaults__[1])
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(
    export, attn_implementation="owner/attention-by-patterns", allow_all_kernels=True, dtype="auto"
).eval()
ids, padded = torch.load(inputs)

def logits(mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits.detach()

def tokens(mask, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)

made = {"logits": logits(), "padded": logits(padded)}
layers = [layer.self_attn for layer in model.model.layers]
made["handles"] = [vars(layer).get("_prunable_attention") is not None for layer in layers]
made["tokens"], made["tokens_padded"] = tokens(torch.ones_like(ids)), tokens(padded)
for name, mask in (("static", torch.ones_like(ids)), ("static_padded", padded)):
    made[name] = tokens(mask, cache_implementation="static", disable_compile=True)
for layer in layers:
    if "_prunable_attention" in vars(layer):
        vars(layer)["_prunable_attention"].backend = "triton"
made["triton"] = logits()
torch.save(made, outputs)
assert "sparse_prune" not in sys.modules
"""


def exported(folder):
    """A Llama with shared key heads, patterns in layers 0 and 2 that differ between heads, and all of layer 1."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    row, column = torch.arange(4)[:, None], torch.arange(4)
    reach = torch.tensor([1, 2, 3, 4])[:, None, None]
    pattern = BlockPattern((row - column < reach) | (column == 0) & (reach > 2), (16, 16), True, 64, 64)
    first, _, third = (layer.name for layer in attach(model))
    apply_patterns(model, {first: pattern, third: pattern})
    return save_pretrained(model, folder)


def run_without_us(export, kernels, tmp_path):
    torch.save((IDS, PADDED), tmp_path / "inputs.pt")
    environment = os.environ | {"LOCAL_KERNELS": f"owner/attention-by-patterns={kernels}", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "without_us.py").write_text(WITHOUT_US)
    return subprocess.run(
        [sys.executable, tmp_path / "without_us.py", export, tmp_path / "inputs.pt", tmp_path / "outputs.pt"],
        env=environment,
        capture_output=True,
        text=True,
    )


@torch.no_grad()
def test_a_program_without_this_library_attends_by_the_patterns(tmp_path):
    """Logits and greedy tokens, padded or not, with either cache, are those of `load`; without the patterns they are
    not."""
    export = exported(tmp_path / "export")
    run = run_without_us(export, save_kernels(tmp_path / "kernels"), tmp_path)
    assert run.returncode == 0, run.stderr
    made = torch.load(tmp_path / "outputs.pt")
    assert made["handles"] == [True, False, True]

    model = load(export)
    dense = LlamaForCausalLM.from_pretrained(export).eval()

    def tokens(mask):
        return model.generate(IDS, attention_mask=mask, max_new_tokens=12, do_sample=False)

    torch.testing.assert_close(made["logits"], model(IDS, use_cache=False).logits)
    torch.testing.assert_close(made["triton"], made["logits"], atol=1e-4, rtol=1e-4)
    assert (made["logits"] - dense(IDS).logits).abs().max() > 0.1
    real = PADDED.bool()
    torch.testing.assert_close(made["padded"][real], model(IDS, attention_mask=PADDED, use_cache=False).logits[real])
    assert made["tokens"].tolist() == made["static"].tolist() == tokens(torch.ones_like(IDS)).tolist()
    assert made["tokens_padded"].tolist() == made["static_padded"].tolist() == tokens(PADDED).tolist()
    assert made["tokens"].tolist() != dense.generate(IDS, max_new_tokens=12, do_sample=False).tolist()


def test_a_model_without_patterns_is_refused(tmp_path):
    exported(tmp_path / "export")
    LlamaForCausalLM.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "dense")
    run = run_without_us(tmp_path / "dense", save_kernels(tmp_path / "kernels"), tmp_path)
    assert run.returncode != 0
    assert "needs a model from a folder or repository with attention_pattern.safetensors, got" in run.stderr


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "bert"])
def test_windows_soft_caps_and_bidirectional_models_compute_what_load_does(tmp_path, kind):
    """In this process, by SDPA's masks, as transformers registers the package's function."""
    AttentionInterface.register("by_patterns", flash_attn_forward)
    AttentionMaskInterface.register("by_patterns", sdpa_mask)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.5, "vocab_size": 50}
    own = {"gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 30, "intermediate_size": 32}}
    config = AutoConfig.for_model(kind, hidden_size=32, **sizes, **own.get(kind, {}))
    family = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = family.from_config(config).eval()
    first, *_ = (layer.name for layer in attach(model))
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() < torch.tensor([1, 2, 3, 4])[:, None, None]
    apply_patterns(model, {first: BlockPattern(near, (16, 16), kind != "bert", 100, 100)})
    export = save_pretrained(model, tmp_path / "export")
    served = family.from_pretrained(export, attn_implementation="by_patterns").eval()
    for mask in (torch.ones_like(IDS), PADDED):
        expected = load(export)(IDS, attention_mask=mask).logits
        torch.testing.assert_close(served(IDS, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_the_package_is_what_the_kernels_package_asks_for(tmp_path):
    """Metadata that it reads, digests of every file, imports of nothing of this library."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    folder = save_kernels(tmp_path)
    for variant, backend in (("torch-cpu", "cpu"), ("torch-cuda", "cuda")):
        build = folder / "build" / variant
        metadata = Metadata.read_from_file(build / "metadata.json")
        assert str(metadata.backend.backend_type) == backend
        assert backend in metadata.id
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, build))
        assert set(metadata.digest.files) == {str(file.relative_to(build)) for file in build.rglob("*.py")}
        assert not [file for file in build.rglob("*.py") if "from sparse_prune" in file.read_text()]


def test_the_package_and_this_library_stand_in_one_process(tmp_path):
    """Each has modules and operators of its own."""
    from kernels import get_local_kernel

    package = get_local_kernel(save_kernels(tmp_path)).__name__
    assert import_module(f"{package}.pattern").BlockPattern is not BlockPattern
    import_module("sparse_prune.kernels.triton.ops")
    import_module(f"{package}.kernels.triton.ops")
    own, others = (getattr(torch.ops, name).block_sparse_attention for name in ("sparse_prune", package))
    assert own is not others


def test_patterns_come_from_the_hub_at_the_revision_of_the_weights(tmp_path, monkeypatch):
    export, asked = exported(tmp_path / "export"), []

    def download(name, file, revision):
        asked.append((name, file, revision))
        if name == "owner/dense":
            raise LocalEntryNotFoundError("no such file")
        return str(export / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    layer = LlamaForCausalLM.from_pretrained(export).model.layers[0].self_attn
    query, key = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    layer.config = copy(layer.config)
    layer.config.name_or_path = "owner/dense"
    with pytest.raises(ValueError, match="needs a model from a folder or repository .* got 'owner/dense'"):
        flash_attn_forward(layer, query, key, key, None)
    layer.config.name_or_path, layer.config._commit_hash = "owner/model", "c0ffee"
    output, _ = flash_attn_forward(layer, query, key, key, None)
    pattern = handle_of(layer).pattern
    own = block_sparse_attention(query, key, key, pattern, AttentionOptions(scale=layer.scaling), backend="reference")
    torch.testing.assert_close(output, own.transpose(1, 2))
    assert asked == [("owner/dense", PATTERN_FILE, None), ("owner/model", PATTERN_FILE, "c0ffee")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 2}, r"is of another model: layer 'model.layers.0.self_attn' has \(4, 2\) query and key heads there"),
        ({"layer_idx": None}, "needs layers that know their number in the one stack of the model, got one of LlamaAtt"),
        ({"is_encoder_decoder": True}, "needs layers that know their number in the one stack of the model"),
    ],
)
def test_what_a_file_does_not_fit_is_refused(tmp_path, change, message):
    layer = LlamaForCausalLM.from_pretrained(exported(tmp_path / "export")).model.layers[0].self_attn
    layer.layer_idx = change.get("layer_idx", 0)
    layer.config.is_encoder_decoder = change.get("is_encoder_decoder", False)
    query = torch.randn(1, change.get("heads", 4), 64, 16)
    with pytest.raises(ValueError, match=message):
        flash_attn_forward(layer, query, query[:, :2], query[:, :2], None)
    assert handle_of(layer) is None


def test_a_folder_with_a_build_of_others_is_refused(tmp_path):
    (tmp_path / "build" / "torch-cpu").mkdir(parents=True)
    with pytest.raises(ValueError, match="`folder` must have no `build` but one of sparse-prune-attention, got"):
        save_kernels(tmp_path)
    assert list(Path(tmp_path / "build" / "torch-cpu").iterdir()) == []
