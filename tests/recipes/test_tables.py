"""Tables on this machine are data sets, whatever they are written in."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict

from sparse_prune.__main__ import main
from sparse_prune.recipes.base.rows import data_rows, document_rows, is_data_set
from sparse_prune.recipes.text_classification.data import load_labelled

ROWS = [{"text": "NA, he said", "label": "01"}, {"text": "two\nlines", "label": "NA"}, {"text": "é", "label": "01"}]
EXPECTED = {"01": {"0": "NA, he said", "2": "é"}, "NA": {"1": "two\nlines"}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where `datasets` keeps what it has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def csv(separator, names=("text", "label")):
    lines = [names, *((f'"{row["text"]}"', row["label"]) for row in ROWS)]
    return "\n".join(separator.join(line) for line in lines) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", csv(",").encode()),
        ("rows.csv", csv(",").encode("utf-8-sig")),
        ("rows.csv", csv(";").encode("utf-16")),
        ("rows.csv", csv("\t", ("Sentence", "Target")).encode()),
        ("rows.tsv", csv("\t", ("idx", "text", "label")).replace('\n"', '\n7\t"').encode()),
        ("rows.csv.gz", gzip.compress(csv("|").encode(), mtime=0)),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS)).encode()),
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("utf-16")),
        ("rows.ndjson.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)),
    ],
)
def test_files_are_read_as_they_are_written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_labelled(str(tmp_path / name)) == EXPECTED
    assert load_labelled(f"hub:{tmp_path / name}") == EXPECTED
    (tmp_path / "folder").mkdir()
    (tmp_path / name).rename(tmp_path / "folder" / name)
    (tmp_path / "folder" / "README.md").write_text("About it.")
    assert load_labelled(str(tmp_path / "folder")) == EXPECTED


def test_parquet_globs_and_saved_folders_are_read(tmp_path):
    rows = Dataset.from_list(ROWS)
    for index in range(3):
        rows.select([index]).to_parquet(tmp_path / f"{index}.parquet")
    assert load_labelled(f"{tmp_path}/*.parquet") == EXPECTED
    assert load_labelled(f"{tmp_path}/*.parquet::text:label") == EXPECTED
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    for name in ("saved", "splits"):
        assert load_labelled(str(tmp_path / name)) == EXPECTED
        assert load_labelled(f"hub:{tmp_path / name}::text") == EXPECTED
    DatasetDict(test=rows).save_to_disk(tmp_path / "held_out")
    with pytest.raises(ValueError, match=r"must have a split called train, got \['test'\] in '.*held_out'"):
        load_labelled(str(tmp_path / "held_out"))
    (tmp_path / "more.csv").write_text(csv(","))
    with pytest.raises(ValueError, match=r"must be tables of one kind \(.csv, .*got '.*\*\.\[cp\]"):
        load_labelled(f"{tmp_path}/*.[cp]*")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", b"text,label\nhe, she,1\nit,0\n", "Row 1 has more cells than there are columns. Mend the file"),
        ("rows.csv", b"text,label\nit,0\nhe, she,1\n", "Expected 2 fields in line 3, saw 3. Mend the file"),
        ("rows.csv", b'text,label\nit,0\n"he,1\n', "EOF inside string.* in quotes"),
        ("rows.csv", "text,label\né,1\n".encode("latin-1"), "can't decode.*`iconv -f LATIN1 -t UTF-8 rows.csv`"),
        ("rows.csv", b"", "No columns to parse"),
        ("rows.jsonl", b"{oops", "JSON parse error"),
        ("rows.jsonl", '{"text": "é", "label": 1}'.encode("latin-1"), "can't decode.*iconv"),
        ("rows.jsonl", b'["he", 1]\n["it", 0]\n', "JSON holds an object a line or a list"),
        ("rows.jsonl", b"", "rows.jsonl is empty. Mend the file"),
        ("rows.json", b"null", "rows.json begins with 'n'. Mend the file"),
        ("rows.json", b" 3", "rows.json begins with '3'. Mend the file"),
        ("rows.parquet", b"PAR1", "Parquet.* Copy it again"),
        ("rows.parquet", b"", "0 bytes. Copy it again"),
    ],
)
def test_broken_tables_are_refused_by_name(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    for stream in (False, True):
        with pytest.raises(
            ValueError, match=rf"(?s)`data` must be a table that can be read, got '.*/{name}': .*{told}"
        ):
            list(data_rows(str(tmp_path / name), ["text"], "data", stream).documents())


def test_a_command_refuses_a_broken_table_in_one_line(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{oops")
    with pytest.raises(SystemExit) as done:
        main(["recipes", "run", "text_classification", "--config", "quickstart", f"--data.data={tmp_path}/rows.jsonl"])
    assert done.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(
        "sparse-prune recipes run text_classification: error: `data` must be a table that can be read"
    )


def test_columns_of_usual_names_are_found_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "sparse_prune")
    (tmp_path / "rows.csv").write_text("id,Review,Sentiment\n1,good,pos\n")
    assert load_labelled(str(tmp_path / "rows.csv")) == {"pos": {"0": "good"}}
    assert "rows.csv are taken: Review, Sentiment." in caplog.text
    (tmp_path / "rows.csv").write_text("sentence,review,label\na,b,1\n")
    with pytest.raises(ValueError, match=r"one of \['sentence', 'review', 'label'\], got 'text'\. Name it"):
        load_labelled(str(tmp_path / "rows.csv"))
    assert load_labelled(f"{tmp_path}/rows.csv::review") == {"1": {"0": "b"}}


def test_rows_hold_text_or_chats(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": value}) for value in ("a", None, " ", '[{"json": 1}]')))
    assert list(document_rows(str(file), "text").documents()) == [(0, "a"), (3, '[{"json": 1}]')]
    file.write_text(json.dumps({"messages": chat}))
    assert list(document_rows(str(file), "text").documents()) == [(0, chat)]
    for value, told in ((str(chat), "str"), (["a", "b"], "list")):
        file.write_text("\n".join(json.dumps({"text": text}) for text in ("a", value)))
        with pytest.raises(ValueError, match=rf"must hold text, or messages .*\({told}\) in row 2 of '.*rows.jsonl'"):
            list(document_rows(str(file), "text").documents())


def test_folders_are_data_sets_if_they_hold_tables_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / ".hidden").touch()
    assert is_data_set(str(tmp_path))
    assert is_data_set("hub:me/data")
    (tmp_path / "a.txt").touch()
    assert not is_data_set(str(tmp_path))
    assert not is_data_set("me/data")
