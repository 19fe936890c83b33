"""The model card: read back with the hub's own client, kept where it is a user's."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_prune import AttentionPruner, ConstantSchedule
from sparse_prune.export import load, push_to_hub, save_pretrained, update_card

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EVALUATION = {
    "setup": {"text": "stdlib", "dtype": "float32", "machine": "a machine"},
    "dense": [{"length": 64, "loss": 2.0, "cost": {"kv_bytes": 2**20, "decode_tokens_per_s": 10.0}}],
    "pruned": [{"length": 64, "loss": 2.25, "cost": {"kv_bytes": 2**19, "decode_tokens_per_s": 12.5}}],
    "tasks": [
        {
            "task": "passkey",
            "length": 64,
            "dense": {"accuracy": 1.0, "interval": [0.94, 1.0]},
            "pruned": {"accuracy": 0.75, "interval": [0.6, 0.86]},
        }
    ],
}


def pruned(name="owner/base"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config.name_or_path = name
    pruner = AttentionPruner(sparsity=ConstantSchedule(final=0.5), block_size=8)
    pruner.attach(model)
    pruner.probe(True)
    model(torch.arange(48)[None])
    pruner.probe(False)
    pruner.update(1)
    return model, pruner


@pytest.fixture
def evaluation(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return tmp_path / "evaluation"


def test_the_card_tells_base_data_pattern_results_and_loading(tmp_path, evaluation):
    model, pruner = pruned()
    path = save_pretrained(model, tmp_path / "export", pruner=pruner, data="poems", evaluation=evaluation)
    card = ModelCard.load(path / "README.md")
    assert card.data.base_model == "owner/base"
    assert "sparse_prune" in card.data.tags
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("loss", 2.25), ("accuracy", 0.75)]
    sparsity = f"{pruner.total_sparsity:.1%}"
    for told in ("| data | poems |", sparsity, "8 x 8", "ConstantSchedule of sparsity, final 0.5", "PatternCache"):
        assert told in card.text
    assert "| loss, nats per token | 64 | 2.0000 | 2.2500 |" in card.text
    assert "| passkey, right (95 % interval) | 64 | 100% (94% to 100%) | 75% (60% to 86%) |" in card.text
    assert "(attention_pattern.png)" in card.text
    assert (path / "attention_pattern.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_known_is_said_and_paths_are_not(tmp_path):
    path = save_pretrained(pruned(name=str(tmp_path))[0], tmp_path / "export")
    text = (path / "README.md").read_text()
    assert "| base model | not recorded |" in text
    assert "| data | not recorded |" in text
    assert "Nothing was measured" in text
    assert str(tmp_path) not in text


def test_its_own_card_is_renewed_and_an_edited_one_stays(tmp_path, evaluation, caplog):
    model, pruner = pruned()
    path = save_pretrained(model, tmp_path / "export")
    save_pretrained(model, path, evaluation=evaluation)
    card = (path / "README.md").read_text()
    assert "2.2500" in card
    save_pretrained(model, path)
    assert "2.2500" not in (path / "README.md").read_text()
    update_card(path, evaluation)
    assert (path / "README.md").read_text() == card
    (path / "README.md").write_text(card + "\nI add that it rhymes.\n")
    caplog.clear()
    save_pretrained(model, path)
    assert (path / "README.md").read_text() == card + "\nI add that it rhymes.\n"
    assert "README.md that sparse_prune did not write, or that was edited. It stays" in caplog.text
    update_card(path, evaluation)
    assert "rhymes" in (path / "README.md").read_text()
    load(path)  # cards may be edited


@pytest.mark.parametrize("there", ["# Mine\n", None])
def test_a_card_on_the_hub_stays_if_it_is_not_ours(tmp_path, monkeypatch, there):
    uploaded = {}
    api = huggingface_hub.HfApi
    (tmp_path / "README.md").write_text(there or "")

    def upload(self, **given):
        uploaded.update(given, files={file.name for file in Path(given["folder_path"]).iterdir()})
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(api, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(api, "file_exists", lambda *_, **__: there is not None)
    monkeypatch.setattr(api, "hf_hub_download", lambda *_, **__: str(tmp_path / "README.md"))
    monkeypatch.setattr(api, "upload_folder", upload)
    push_to_hub(pruned()[0], "me/small")
    assert "README.md" in uploaded["files"]
    assert uploaded["ignore_patterns"] == ([] if there is None else ["README.md", "attention_pattern.png"])


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`evaluation` must be a folder that `sparse-prune evaluate` wrote"):
        save_pretrained(pruned()[0], tmp_path / "export", evaluation=tmp_path)
    assert not (tmp_path / "export").exists()
