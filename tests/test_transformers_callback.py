"""Pruning in a `transformers.Trainer`, resumed and unbroken."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparse_prune import AttentionPruner, CubicSchedule
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.retrieval import Retrieval, text_probes
from sparse_prune.scores import Influence
from sparse_prune.transformers_callback import STATE_FILE, AttentionPruningCallback

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(50, (32, 64), generator=torch.Generator().manual_seed(1))
]


LONG = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(50, (8, 256), generator=torch.Generator().manual_seed(1))
]


def run(path, *, resume=None, score=None, swap=True, rows=ROWS, tokenizer=None, retrieval="auto", **arguments):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | ({} if tokenizer is None else {"vocab_size": len(tokenizer)})))
    schedule = CubicSchedule(final=0.5, end_step=0.5)
    pruner = AttentionPruner(sparsity=schedule, block_size=8, patience=1, min_delta=1.0, score=score)
    callback = AttentionPruningCallback(pruner, every_n_steps=2, swap=swap, retrieval=retrieval)
    given = {"max_steps": 12, "save_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    given |= {"disable_tqdm": True, "learning_rate": 1e-3, "dataloader_pin_memory": False}
    given |= arguments
    trainer = Trainer(
        model, TrainingArguments(path, **given), train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, callback


@pytest.mark.parametrize("score", [None, Influence()], ids=["attention", "gradient"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, step, score):
    model, callback = run(tmp_path, score=score, swap=False)
    assert callback.pruner.total_sparsity == pytest.approx(0.5, abs=0.02)
    assert all(state.settled_at is not None for state in callback.pruner.layers.values())
    again, resumed = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), score=score, swap=False)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    patterns = callback.pruner.patterns
    assert all(pattern.equals(patterns[name]) for name, pattern in resumed.pruner.patterns.items())


def test_settled_layers_are_swapped_by_measurement(tmp_path, monkeypatch):
    times = iter([{"dense": 2.0, "gather": 1.0}, {"dense": 1.0, "gather": 2.0}])
    asked = []
    monkeypatch.setattr("sparse_prune.swap_timer.hides_host", lambda device: False)
    monkeypatch.setattr(
        "sparse_prune.swap_timer.time_attention",
        lambda *args: asked.append(args[-1]) or next(times),
    )
    _, callback = run(tmp_path)
    assert asked == [False, False]
    first, second = callback.pruner.layers.values()
    assert (first.layer.mode, first.layer.backend) == ("sparse", "gather")
    assert second.reverted


def test_accumulation_prunes_as_a_larger_batch_does(tmp_path):
    _, small = run(tmp_path / "a", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2)
    _, large = run(tmp_path / "b", max_steps=2)
    for name, state in small.pruner.layers.items():
        other = large.pruner.layers[name].scores.value()
        torch.testing.assert_close(state.scores.value(), other, rtol=1e-3, atol=1e-6)


def test_a_language_model_is_asked_by_the_first_decisions(tmp_path, caplog, monkeypatch):
    with caplog.at_level("INFO", "sparse_prune"):
        _, callback = run(tmp_path / "a", rows=LONG, swap=False, max_steps=8, save_steps=1)
    for state in callback.pruner.layers.values():
        assert [*state.asked] == ["questions", "repeats"]
    assert "pruning keeps the blocks that the model looks at to answer questions" in caplog.text
    # A run that goes on has asked about two of eight texts, and ends with the same patterns.
    resume = str(tmp_path / "a" / "checkpoint-1")
    _, again = run(tmp_path / "a", rows=LONG, swap=False, max_steps=8, resume=resume)
    patterns = callback.pruner.patterns
    assert all(pattern.equals(patterns[name]) for name, pattern in again.pruner.patterns.items())
    # None asks nothing; too short a text cannot be asked about, which is told.
    _, silent = run(tmp_path / "b", rows=LONG, swap=False, max_steps=2, retrieval=None)
    with caplog.at_level("INFO", "sparse_prune"):
        _, short = run(tmp_path / "c", swap=False, max_steps=2)
    assert not any(state.asked for part in (silent, short) for state in part.pruner.layers.values())
    assert "the model was not asked for what stands far back (ValueError: `sequences` must hold at least" in caplog.text
    with pytest.raises(ValueError, match="`sequences` must hold at least 128 tokens"):
        run(tmp_path / "d", max_steps=2, retrieval=Retrieval())
    with pytest.raises(ValueError, match="`Retrieval.module` must name a module of LlamaForCausalLM, got 'head'"):
        run(tmp_path / "e", max_steps=2, retrieval=Retrieval(module="head"))


def test_a_trainer_with_a_tokenizer_asks_in_words(tmp_path, tiny_model, monkeypatch):
    asked, tokenizer = [], load_tokenizer(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token

    def spied(given):
        assert given is tokenizer

        def words(*args):
            asked.append(text_probes(given, *args))
            return asked[-1]

        return words

    monkeypatch.setattr("sparse_prune.transformers_callback.questions_by", spied)
    run(tmp_path, rows=LONG, tokenizer=tokenizer, max_steps=1, retrieval=Retrieval(heads=0.5))
    assert [len(probes) for probes in asked] == [2, 8]  # on the texts of the step, then for the heads


def test_nothing_is_watched_in_an_evaluation(tmp_path):
    _, callback = run(tmp_path, max_steps=2)
    assert all(state.layer.probe_block_size is None for state in callback.pruner.layers.values())


def test_what_cannot_go_on_is_refused(tmp_path):
    run(tmp_path, max_steps=4)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"must hold {STATE_FILE}"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    pruner = AttentionPruner(sparsity=CubicSchedule(final=0.5, end_step=2))
    with pytest.raises(ValueError, match="`every_n_steps`"):
        AttentionPruningCallback(pruner, every_n_steps=0)
    with pytest.raises(TypeError, match="`pruner`"):
        AttentionPruningCallback(CubicSchedule(final=0.5, end_step=2))
