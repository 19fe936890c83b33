"""Rows of all shapes that trl and axolotl know become text, chats, or prompts with their answers."""

import json

import datasets
import pytest

from sparse_prune.recipes.base.rows import document_rows
from sparse_prune.recipes.base.turns import Exchange, document_of

ASKED, ANSWERED = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Three."}
CHAT = [ASKED, ANSWERED]
PREFERRED = {"prompt": "Two?", "chosen": CHAT, "rejected": [ASKED, {"role": "assistant", "content": "Four."}]}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(*rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / "rows.jsonl")

    return save


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Three."}]}, CHAT),
        ({"messages": [ASKED, ANSWERED | {"weight": 0}]}, [ASKED, ANSWERED | {"weight": 0}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Two?"}]}, ANSWERED]}, CHAT),
        ({"instruction": "Two?", "input": "", "output": "Three."}, CHAT),
        (
            {"instruction": "Count:", "input": "Two?", "output": "Three."},
            [ASKED | {"content": "Count:\n\nTwo?"}, ANSWERED],
        ),
        ({"Instruction": "Two?", "Output": "Three."}, CHAT),
        ({"prompt": "Two", "completion": " three."}, Exchange("Two", " three.")),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"prompt": "One, two", "chosen": ", three", "rejected": ", four"}, Exchange("One, two", ", three")),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": []}, CHAT),
        (PREFERRED, CHAT),
    ],
)
def test_rows_are_read_by_their_shape(saved, row, document):
    assert [found for _, found in document_rows(saved(row), "text").documents()] == [document]


def test_columns_of_any_name_may_hold_a_question_and_its_answer(saved):
    name = saved({"id": 1, "question": "Two?", "reply": "Three."}, {"id": 2, "question": "Three?", "reply": None})
    with pytest.raises(ValueError, match=r"one of \['id', 'question', 'reply'\], got 'text'.*NAME::PROMPT:ANSWER"):
        document_rows(name, "text")
    assert list(document_rows(f"{name}::question:reply", "text").documents()) == [(0, CHAT)]
    with pytest.raises(ValueError, match=r"with at most 3 columns \(prompt, input, answer\)"):
        document_rows(f"{name}::id:question:reply:id", "text")


def test_what_is_taken_and_what_is_left_out_is_said(saved, caplog):
    caplog.set_level("INFO", "sparse_prune")
    preferred = saved(PREFERRED)
    document_rows(preferred, "text")
    assert (
        f"These columns of {preferred} are taken: prompt, chosen. "
        "The last one holds what is to be predicted; left out: rejected." in caplog.text
    )
    name = saved({"instruction": "Two?", "input": "", "output": "Three.", "text": "Two? Three."})
    assert list(document_rows(name, "text").documents()) == [(0, "Two? Three.")]
    assert (
        f"The column text of {name} is taken. Name instruction, input, output as in {name}::instruction:input:output"
        in caplog.text
    )
    with pytest.raises(ValueError, match="got 'text'. Name it as in"):
        document_rows(saved({"prompt": "a", "completion": "b", "chosen": "c"}), "text")


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ([{"from": "observation", "value": "3"}], "a turn from 'observation', which is none of human, gpt, user"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a turn with .*image_url.*, which is not text"),
        ([{"role": "user", "content": 3}], r"a turn that holds '3' \(int\)"),
        ("[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]", r"\(str\)"),  # as NumPy prints
        ('[{"from": "human", "value": null}]', r"\(str\)"),
        (["a", "b"], r"\(list\)"),
        (3, r"\(int\)"),
    ],
)
def test_what_is_neither_text_nor_a_chat_is_refused(cell, told):
    with pytest.raises(ValueError, match=told):
        document_of(["messages"], [cell])


def test_a_preferred_chat_must_hold_its_prompt():
    with pytest.raises(ValueError, match="a chat without its prompt 'Four\\?'"):
        document_of(["prompt", "chosen"], ["Four?", CHAT])


def test_a_refused_row_is_named(saved):
    name = saved({"messages": CHAT}, {"messages": [{"from": "bot", "value": "Hi"}]})
    with pytest.raises(
        ValueError, match=r"`text` must hold text, .*got a turn from 'bot'.* in row 2 of '.*rows.jsonl'"
    ):
        list(document_rows(name, "text").documents())
