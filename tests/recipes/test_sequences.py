"""Documents as sequences: joined or packed, every token counts once."""

import json

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sparse_prune.recipes.base.held_out import HeldOutMean
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.chats import IGNORED
from sparse_prune.recipes.causal_lm.cli import main
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.module import CausalLMModule
from sparse_prune.recipes.causal_lm.pretrained import check_packing, load_model
from sparse_prune.recipes.causal_lm.sequences import make_sequences
from support.settings import pruning_callbacks, run_settings

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
LENGTHS = [3, 70, 20, 1, 55, 64, 5, 30, 200, 2, 9]
DOCUMENTS = [chr(97 + place) * length for place, length in enumerate(LENGTHS)]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def rows(sequences):
    """Documents of every packed sequence, as places."""
    for ids, labels, positions in zip(sequences.input_ids, sequences.labels, sequences.position_ids, strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            yield ids[start:end], labels[start:end], positions[start:end]


def test_joined_documents_are_cut(tokenizer):
    made = make_sequences(tokenizer, DOCUMENTS, 50, 99, "to train", "length")
    text = "|".join([*DOCUMENTS, ""])
    decoded = tokenizer.decode(made.input_ids.flatten()).replace(" ", "").replace("<eos>", "|")
    assert decoded == text[: len(text) // 50 * 50]
    assert torch.equal(made.labels, made.input_ids)
    assert set(made[0]) == {"input_ids", "labels"}
    assert len(make_sequences(tokenizer, DOCUMENTS, 50, 3, "to train", "length")) == 3


def test_packed_documents_stay_whole_and_every_token_but_their_first_counts_once(tokenizer, caplog):
    caplog.set_level("INFO", "sparse_prune")
    for length in (16, 64, 300):
        made = make_sequences(tokenizer, DOCUMENTS, length, 999, "to train", "length", pack=True)
        assert made.input_ids.shape == made.labels.shape == made.position_ids.shape == (len(made), length)
        counted = sorted(made.labels[made.labels != IGNORED].tolist())
        ids = [tokenizer(document)["input_ids"] + [tokenizer.eos_token_id] for document in DOCUMENTS]
        assert counted == sorted(token for document in ids for token in document[1:])
        whole = [document for document in ids if 2 <= len(document) <= length]
        found = [part.tolist() for part, _, _ in rows(made)]
        assert all(document in found for document in whole)
        for part, labels, positions in rows(made):
            assert positions.tolist() == list(range(len(part)))
            assert labels[0] == IGNORED
            assert torch.equal(labels[1:], part[1:])
    padding = 1 - sum(len(document) for document in ids) / made.labels.numel()
    assert f"Packed to train: {len(made)} sequences, of which {100 * padding:.1f} % is padding." in caplog.text


def test_packed_loss_is_that_of_the_documents_alone(tiny_model, tokenizer):
    model = load_model(tiny_model).eval()
    check_packing(model)
    total, counts = 0.0, 0
    with torch.no_grad():
        for document in DOCUMENTS:
            ids = torch.tensor([tokenizer(document)["input_ids"] + [tokenizer.eos_token_id]])
            logits = model(ids).logits[0, :-1]
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            counts += len(logits)
    module = CausalLMModule(tiny_model, packed=True).eval()
    module.log = lambda *args, **options: None
    for batch in (1, 3):
        made, mean = make_sequences(tokenizer, DOCUMENTS, 256, 99, "", "length", pack=True), HeldOutMean()
        module.val_loss = mean
        for start in range(0, len(made), batch):
            examples = [made[place] for place in range(start, min(start + batch, len(made)))]
            stacked = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
            with torch.no_grad():
                module._watch("val", type("Batch", (), {"examples": stacked, "counted": len(examples)}))
        assert int(mean.examples) == counts
        assert float(mean.compute()) == pytest.approx(total / counts, rel=1e-5)


def test_models_whose_attention_leaves_a_document_are_refused():
    config = GPT2Config(vocab_size=98, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).train()
    check_packing(model)
    assert model.training
    forward = model.forward
    model.forward = lambda input_ids, position_ids=None, **more: forward(input_ids, **more)
    with pytest.raises(ValueError, match=r"`data.pack` must be false for GPT2LMHeadModel, which lets packed documents"):
        check_packing(model)
    model.forward = lambda input_ids, **more: forward(input_ids, **more)
    with pytest.raises(ValueError, match="takes no position ids, got true. Leave it out"):
        check_packing(model)


def test_of_chats_only_answers_count_and_sequences_without_any_are_left_out(tiny_model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    chats = [
        [{"role": "user", "content": "q" * 200}],
        [{"role": "user", "content": "q" * 9}, {"role": "assistant", "content": "a" * 40}],
    ] * 5
    for pack in (False, True):
        made = make_sequences(tokenizer, chats, 80, 99, "to train", "length", pack=pack)
        counted = tokenizer.decode(made.labels[made.labels != IGNORED]).replace(" ", "")
        assert set(counted.replace("<eos>", "")) == {"a"}
        assert (made.labels[:, 1:] != IGNORED).any(1).all()
    assert counted == ("a" * 40 + "<eos>") * 5
    with pytest.raises(
        ValueError, match=r"something to predict to train, got \d+ tokens without an answer. Give chats"
    ):
        make_sequences(tokenizer, chats[:1], 64, 99, "to train", "length")
    batch = {name: value[None] for name, value in made[0].items()}
    module = CausalLMModule(tiny_model).eval()
    logits = module.model(batch["input_ids"], position_ids=batch["position_ids"]).logits
    own = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(module._loss(batch), own)


@pytest.mark.parametrize(("special", "end"), [({"sep_token": "|"}, "|"), ({}, "")])
def test_without_an_end_of_text_token_documents_are_joined_all_the_same(tmp_path, caplog, special, end):
    caplog.set_level("INFO", "sparse_prune")
    made = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate("abc|")}, unk_token="|"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "model")
    for number in range(200):
        (tmp_path / f"{number}.txt").write_text("abc")
    data = TextDataModule(str(tmp_path / "model"), f"{tmp_path}/*.txt", context_length=8, train_sequences=2)
    data.setup("fit")
    text = load_tokenizer(str(tmp_path / "model")).decode(data.sequences["train"].flatten()).replace(" ", "")
    assert text == (f"abc{end}" * 6)[:16]
    assert ("no end-of-text token: nothing stands between documents" in caplog.text) == (not end)


def test_what_does_not_go_together_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="`question_share` must be 0 with `pack`, whose documents stay apart"):
        TextDataModule(tiny_model, pack=True, question_share=0.25)
    with pytest.raises(ValueError, match=r"at least 2 tokens to train, got 0\. Give more"):
        make_sequences(load_tokenizer(tiny_model), [], 64, 1, "to train", "length", pack=True)


@pytest.mark.parametrize("pack", [False, True])
def test_a_run_on_chats_is_pruned_and_reported(tiny_model, tokenizer, tmp_path, monkeypatch, pack):
    model = tmp_path / "model"
    load_model(tiny_model).save_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "abc " * 20}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(60)))
    data = {"text": str(tmp_path / "chats.jsonl"), "context_length": 256, "val_sequences": 1, "test_sequences": 1}
    data |= {"train_sequences": 9, "pack": pack}
    settings = run_settings(
        tmp_path / "run", {"model": str(model)}, data, pruning_callbacks(32, 0.4), compare_dense=True
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("sys.argv", ["causal_lm", "fit", "--config", str(tmp_path / "config.yaml")])
    main()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.4, abs=0.06)
    assert report["records"][0]["loss"] == pytest.approx(report["dense"]["records"][0]["loss"], rel=1e-5)
    assert report["loss"] < report["records"][0]["loss"]
