"""Files are checked before the first step, each by name."""

import json
import struct

import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sparse_prune.recipes.base.pretrained import check_vocabulary, load_tokenizer, locate
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.vision.data import ImageDataModule

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=98, **sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_whole_weights_pass(folder):
    assert locate(str(folder)) == (str(folder), {})
    load_model(str(folder))


@pytest.mark.parametrize("kept", [4, 100, -10])
def test_cut_weights_are_refused_by_name(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"must hold whole weights, got '.*model\.safetensors', of which only \d+"):
        load_model(str(folder))


def test_missing_files_are_refused_by_name(folder):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder / "parts", max_shard_size="5KB")
    locate(str(folder / "parts"))
    lost = sorted((folder / "parts").glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"must hold whole weights, got '.*parts' without '{lost.name}'\. Copy"):
        load_model(str(folder / "parts"))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got '.*adapter' without 'adapter_model.safetensors'"):
        locate(str(folder / "adapter"))


def test_what_is_no_folder_and_a_folder_without_tokenizer_are_refused(folder):
    with pytest.raises(ValueError, match=r"must be a folder, a `.gguf` file or a hub id, got the file '.*'\. Name its"):
        locate(str(folder / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="`model` must be an existing folder, got 'runs/gone/model'"):
        locate("runs/gone/model")
    with pytest.raises(ValueError, match=r"must have a tokenizer beside its weights, got none that loads in '.*model'"):
        load_tokenizer(str(folder))


def test_what_transformers_does_not_load_is_refused_by_name(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"a model of the hub, got 'someone/nothing': .*\. Check the name and the"):
            load("someone/nothing")
    (folder / "config.json").write_text('{"model_type": "of tomorrow"}')
    with pytest.raises(ValueError, match=r"that `save_pretrained` of transformers wrote, got '.*model': .*of tomorrow"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_pointers_of_git_lfs_are_refused_by_name(folder, name):
    (folder / name).write_bytes(POINTER)
    place = folder / name if name.endswith("gguf") else folder
    with pytest.raises(ValueError, match=rf"got '.*{name}', a pointer of Git LFS, .* Run `git lfs pull` in"):
        load_model(str(place))


def test_a_header_that_is_no_header_is_refused(folder):
    for header in (b"[1]" + b" " * 61, json.dumps({"a": {"data_offsets": 3}}).encode()):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(ValueError, match="or another kind of file"):
            load_model(str(folder))


def test_cut_and_foreign_gguf_files_are_refused_by_name(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"`model` must be a whole GGUF file .*, got '.*cut\.gguf'"):
        load_model(str(tmp_path / "cut.gguf"))
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match=r"got '.*page\.gguf', which is not a GGUF file"):
        load_model(str(tmp_path / "page.gguf"))


def test_a_tokenizer_larger_than_its_embedding_is_refused(folder, tiny_model):
    model, tokenizer = load_model(str(folder)), load_tokenizer(tiny_model)
    check_vocabulary(tokenizer, model)
    larger = AutoTokenizer.from_pretrained(tiny_model)
    larger.add_tokens([f"<new {index}>" for index in range(98)])
    with pytest.raises(ValueError, match=rf"each of its tokenizer's {len(larger)} tokens, got 98\. Save"):
        check_vocabulary(larger, model)


def test_broken_images_are_refused_by_name(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(5):
            noise = np.random.default_rng(index).integers(0, 255, (30, 30, 3), np.uint8)
            image.fromarray(noise).save(tmp_path / label / f"{index}.png")
    data = ImageDataModule(str(tmp_path), image_size=4)
    data.setup("fit")
    cut = tmp_path / "a" / "2.png"
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "b" / "4.jpg").write_text("not found")
    found = []
    for split in ("train", "val", "test"):
        data = ImageDataModule(str(tmp_path), image_size=4)
        try:
            data.make(split, 100)
        except ValueError as error:
            found.append(str(error))
    told = "\n".join(found)
    for file in (cut, tmp_path / "b" / "4.jpg"):
        assert repr(str(file)) in told
    assert all(text.startswith("`data` must hold images that can be read, got ") for text in found)
