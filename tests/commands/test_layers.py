import sys

import pytest
from transformers import LlamaConfig

from sparse_prune.__main__ import main
from sparse_prune.attention import list_layers
from sparse_prune.commands.layers import build


def test_a_transformers_folder_is_listed_without_weights(tmp_path, capsys):
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    main(["layers", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["model.layers.0.self_attn", "transformers", "4", "2", "yes", "-"]
    assert lines[-1] == "2 of 2 attention layers of LlamaForCausalLM can be pruned."
    assert next(build(str(tmp_path))[0].parameters()).is_meta


def test_a_factory_is_listed(tmp_path, monkeypatch, capsys):
    code = "from torch import nn\ndef make():\n    layer = nn.TransformerDecoderLayer(32, 4, 32)\n"
    (tmp_path / "zoo_of_mine.py").write_text(code + "    return nn.TransformerDecoder(layer, 1)\n")
    monkeypatch.chdir(tmp_path)
    main(["layers", "zoo_of_mine:make"])
    out = capsys.readouterr().out
    assert "cross-attention" in out
    assert "1 of 2 attention layers of TransformerDecoder can be pruned." in out


def test_a_model_without_attention_says_so_and_fails(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["layers", "torch.nn:Identity"])
    assert stopped.value.code == 1
    assert "0 of 0 attention layers of Identity can be pruned." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("torch.nn:nothing", "MODEL must name a callable"),
        ("torch.nn:Linear", "torch.nn:Linear must be callable without arguments"),
        ("no_such_package:make", "No module named 'no_such_package'"),
        ("/no/such/folder", "got '/no/such/folder', where there is no config.json"),
        ("./folder", "got './folder', where there is no config.json"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(name, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["layers", name])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_timm_models_are_listed():
    pytest.importorskip("timm")
    model, example = build("timm:vit_tiny_patch16_224")
    layers = list_layers(model, example)
    assert len(layers) == 12
    assert {(layer.kind, layer.num_heads, layer.causal, layer.problem) for layer in layers} == {
        ("sdpa", 3, False, None)
    }


def test_a_missing_package_names_what_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        main(["layers", "gpt2"])
    assert stopped.value.code == 2
    assert "Run `pip install 'sparse_prune[hf]'`." in capsys.readouterr().err
