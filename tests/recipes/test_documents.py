"""Which documents are trained on, and which are held out."""

import json

import pytest

from sparse_prune.recipes.causal_lm.documents import all_documents, load_documents, split_documents, split_text

SPLITS = ("train", "val", "test")


def split(text, share=0.1):
    return {name: list(documents) for name, documents in split_text(text, share).items()}


@pytest.mark.parametrize(("mark", "words"), [("\n\n", 40), ("\n", 40), (" ", 1)])
def test_a_corpus_of_one_file_is_split_inside(tmp_path, caplog, mark, words):
    caplog.set_level("INFO", "sparse_prune")
    passages = [f"{number:04d} " * words for number in range(1000)]
    text = mark.join(passage.strip() for passage in passages)
    (tmp_path / "one.txt").write_text(text)
    found = split(str(tmp_path / "one.txt"))
    assert [len(found[name]) for name in SPLITS] == [1, 1, 1]
    assert "".join(found[name][0] for name in SPLITS) == text
    assert [len(found[name][0]) / len(text) for name in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    for name in SPLITS[:2]:
        assert found[name][0].endswith(mark)  # no passage is in two splits
    assert (
        caplog.text.count("too few documents (1) to hold out whole ones: the last 10 % of each are for the test") == 1
    )
    assert list(all_documents(str(tmp_path / "one.txt"))) == [text]


def test_a_few_rows_are_split_like_a_few_files(tmp_path):
    rows = [{"text": f"{number} " * 100} for number in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = split(str(tmp_path / "rows.jsonl"))
    assert ["".join(parts) for parts in zip(*found.values(), strict=True)] == [row["text"] for row in rows]


def test_documents_that_are_enough_stay_whole(tmp_path, caplog):
    caplog.set_level("INFO", "sparse_prune")
    documents = {str(number): f"{number} words" for number in range(100)}
    found = split_documents(documents)
    assert sorted(sum(found.values(), [])) == sorted(documents.values())
    rows = [{"text": text} for text in documents.values()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert {name: sorted(texts) for name, texts in split(str(tmp_path / "rows.jsonl")).items()} == {
        name: sorted(texts) for name, texts in found.items()
    }
    assert "too few" not in caplog.text


def test_tables_and_files_go_together(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(50)))
    (tmp_path / "text").mkdir()
    for n in range(50):
        (tmp_path / "text" / f"{n}.md").write_text(f"file {n}")
    entries = [str(tmp_path / "rows.jsonl"), str(tmp_path / "text" / "*.md")]
    expected = {f"{kind} {n}" for kind in ("row", "file") for n in range(50)}
    assert set(all_documents(entries)) == expected
    found = split(entries, 0.3)
    assert set(sum(found.values(), [])) == expected
    for name in SPLITS:
        assert {text.split()[0] for text in found[name]} == {"row", "file"}


def test_what_lies_in_a_folder_is_text_or_said(tmp_path, caplog):
    caplog.set_level("INFO", "sparse_prune")
    for name in ("a.txt", "sub/b.json", ".DS_Store", ".git/c.txt", "__MACOSX/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = load_documents(str(tmp_path))
    assert set(found.values()) == {"a.txt", "sub/b.json"}
    assert f"Hidden files are left out: 3 in {tmp_path}." in caplog.text
    assert "Tables among the text files are read as text, 1 in" in caplog.text
    (tmp_path / "figure.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"`text` must hold text, got '.*figure.png', an image. Remove it, or name"):
        load_documents(str(tmp_path))
    assert load_documents(f"{tmp_path}/*.txt") == {str(tmp_path / "a.txt"): "a.txt"}
    with pytest.raises(ValueError, match=r"got \['wikitext'\], which matches none.*tables, 'stdlib' or 'hub:NAME'"):
        split_text("wikitext")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="blank.txt', which matches none but blank ones"):
        load_documents(str(tmp_path / "blank.txt"))
