"""Of a chat, the answers are to be predicted, and where they end."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_prune.recipes.base.turns import Exchange
from sparse_prune.recipes.causal_lm.chats import IGNORED, chat_tokens, exchange_tokens

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}<eos>"
    "{% else %}{{ raise_exception('Only user and assistant!') }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: only the last answer shows that there was nothing to think about
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}"
    "<think></think>{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hi?", "name": None},
    {"role": "assistant", "content": " Hello. "},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
]


def tokenizer(template):
    """Of single bytes and special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split("", "isolated")]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template=template)


def predicted(template, chat):
    """The whole chat, and the stretches of it that are to be predicted."""
    reader = tokenizer(template)
    ids, labels = chat_tokens(reader, chat)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    marked = "".join(
        "\0" if label == IGNORED else reader.decode([token]) for token, label in zip(ids, labels, strict=True)
    )
    return reader.decode(ids), [part for part in marked.split("\0") if part]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Hello.<|im_end|>", "Hello.<|im_end|>"]),
        (MISTRAL, [" Hello. <eos>", "Hello.<eos>"]),
        (THINKING, [" Hello. <|im_end|>", "Hello.<|im_end|>"]),
    ],
)
def test_answers_and_their_ends_are_predicted_and_nothing_else(template, answers):
    text, found = predicted(template, CHAT)
    assert found == answers
    bare = [{name: value for name, value in turn.items() if value} for turn in CHAT]
    assert text == tokenizer(template).apply_chat_template(bare, tokenize=False)


def test_chats_that_end_with_a_question_or_begin_with_an_answer():
    assert predicted(CHATML, CHAT[:3])[1] == ["Hello.<|im_end|>"]
    assert predicted(CHATML, CHAT[:1])[1] == []
    assert predicted(CHATML, CHAT[1:2])[1] == ["Hello.<|im_end|>"]
    assert predicted(CHATML, [CHAT[0], {"role": "assistant", "content": ""}])[1] == []


def test_an_answer_of_no_weight_is_not_predicted():
    assert predicted(CHATML, [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]])[1] == ["Hello.<|im_end|>"]


def test_of_an_exchange_the_answer_and_its_end_are_predicted():
    reader = tokenizer(None)
    ids, labels = exchange_tokens(reader, Exchange("One, two", ", three"), [reader.eos_token_id])
    assert reader.decode(ids) == "One, two, three<eos>"
    predicted_ids = [label for label in labels if label != IGNORED]
    assert labels == [IGNORED] * len("One, two") + predicted_ids
    assert reader.decode(predicted_ids) == ", three<eos>"


def test_what_the_template_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"`text` must hold chats .* begins with .*'system'.*Only user and assistant!"):
        chat_tokens(tokenizer(MISTRAL), [{"role": "system", "content": "Be kind."}, *CHAT])
    with pytest.raises(ValueError, match=r"without|no chat template, got chats\. Take an instruction-tuned model"):
        chat_tokens(tokenizer(None), CHAT)
