"""The closing summary of a fit reaches users at the default log level, once, and tells what became of the pruning."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.loggers import CSVLogger

from sparse_prune import Constraints, swap_timer
from sparse_prune.callbacks import KernelSwap, attention_pruning
from sparse_prune.callbacks.closing import closing
from sparse_prune.export import load_patterns
from sparse_prune.swap_event import NO_GAIN, NO_GAIN_REMEDY
from support.tiny import TinyModule, batches, pruning, trainer


@pytest.fixture
def told(monkeypatch):
    """What was told, as it comes."""
    found = []
    monkeypatch.setattr(attention_pruning, "tell", lambda trainer, message: found.append(message))
    return found


def slower(monkeypatch):
    """No backend is faster, says the clock."""
    times = {"dense": 1.0, "gather": 2.0}
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: dict(times))


def test_a_run_that_went_well(tmp_path, told):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = pruning(swap=KernelSwap("gather"))
    trainer(tmp_path, [callback], logger=logger).fit(TinyModule(), batches())
    (message,) = told
    total = callback.pruner.total_sparsity
    lines = [line.strip() for line in message.splitlines()]
    assert lines[:2] == [
        f"Pruning: {total:.1%} of the attention of 2 layers is pruned (40.0% asked for at the last decision).",
        "Swapped: 2 of 2 layers skip what was pruned: 2 on gather.",
    ]
    assert lines[2].startswith("Retrieval: nothing was kept for it, and a language model loses what it looks up")
    assert lines[3] == f"Patterns: {tmp_path / 'attention_pattern.safetensors'}."
    assert lines[4].startswith(f"Next: `sparse-prune report {tmp_path}` shows the run on one page; ")
    assert len(lines) == 5


def test_a_language_model_is_told_what_was_kept_for_retrieval(tmp_path, told):
    heads = {"model.model.layers.0.self_attn": (0,)}
    callback = pruning(constraints=Constraints(protected_heads=heads), swap=KernelSwap("gather"))
    trainer(tmp_path, [callback]).fit(TinyModule(), batches())
    assert "Retrieval: pruning keeps one whole head. A" in told[0]
    for state in callback.pruner.layers.values():
        state.average_beside("questions")
    assert (
        "Retrieval: pruning keeps the blocks that the model looks at to answer questions and one whole head. "
        in closing(callback.pruner, callback.report, [], None, False)
    )
    for state in callback.pruner.layers.values():
        state.layer.causal = False
    assert "Retrieval" not in closing(callback.pruner, callback.report, [], None, False)


def test_a_language_model_that_could_not_be_asked_is_told_why(tmp_path, told):
    trainer(tmp_path, [pruning(retrieval="auto", swap=KernelSwap("gather"))]).fit(TinyModule(), batches())
    assert (
        "Retrieval: the model was not asked for what stands far back (ValueError: `sequences` must hold at least 128 "
        "tokens each for retrieval probes, got 64."
    ) in told[0]


def test_a_run_that_gained_nothing_keeps_what_it_learned(tmp_path, told, monkeypatch, caplog):
    slower(monkeypatch)
    callback = pruning()
    trainer(tmp_path, [callback]).fit(TinyModule(), batches())
    (message,) = told
    assert "Pruning: 0.0% of the attention of 2 layers is pruned" in message
    assert "Swapped" not in message
    assert f"Reverted: 2 of 2 layers got all their connections back, because {NO_GAIN}: at 4" in message, (
        "the pattern's sparsity is about 40 %"
    )
    assert "attention like that of model.model.layers.0.self_attn measures dense 1 ms, gather 2 ms" in message
    assert "(dense and best sparse: model.model.layers.1.self_attn 1 and 2 ms)" in message
    assert NO_GAIN_REMEDY in message
    # The forecast said the same in the same words.
    forecast = next(text for text in caplog.messages if "not expected" in text)
    assert f"because {NO_GAIN}: at 40% sparsity and 64 tokens, attention like that of" in forecast
    assert NO_GAIN_REMEDY in forecast
    # A machine that gains by the patterns has them.
    path = tmp_path / "attention_pattern.safetensors"
    assert "marked as unused" in message
    assert {pattern.sparsity for pattern in load_patterns(path).values()} == {0.0}
    learned = load_patterns(path, unused=True)
    for name, state in callback.pruner.layers.items():
        assert learned[name].keep.equal(state.unused_pattern.keep)
        assert learned[name].sparsity > 0.3


def test_layers_that_have_not_settled_are_named_with_the_remedy(tmp_path, told):
    trainer(tmp_path, [pruning()], steps=3).fit(TinyModule(), batches())
    assert "Not settled: 2 of 2 layers (model.model.layers.0.self_attn, model.model.layers.1.self_attn)" in told[0]
    assert "End the schedule earlier, train longer" in told[0]
    assert "sparse-prune report" not in told[0]  # there is no CSVLogger


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_breaks_off_has_its_last_word(tmp_path, told, kind):
    def fail(fit, *_):
        if fit.global_step == 3:
            raise kind("no more")

    with pytest.raises((kind, SystemExit)):
        trainer(tmp_path, [pruning(), LambdaCallback(on_train_batch_end=fail)]).fit(TinyModule(), batches())
    assert len(told) == 1
    assert "Not settled: 2 of 2 layers" in told[0]
    assert f"Patterns: {tmp_path / 'attention_pattern.safetensors'}" in told[0]
    assert (tmp_path / "attention_pattern.safetensors").exists()


def test_a_fit_that_is_refused_has_none(tmp_path, told):
    constraints = Constraints(protected_layers=("nowhere",))
    fit = trainer(tmp_path, [pruning(constraints=constraints)])
    with pytest.raises(ValueError, match="`protected_layers`"):
        fit.fit(TinyModule(), batches())
    assert not told


def test_without_files_and_without_decisions(tmp_path, told, monkeypatch):
    trainer(tmp_path, [pruning()], fast_dev_run=2).fit(TinyModule(), batches())
    assert "Patterns: not written to a file." in told[0]
    assert "Next" not in told[0]
    assert closing(pruning().pruner, None, [], None, False).startswith("Pruning: no decision was made")


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_users_see_it_without_raising_a_log_level(tmp_path, package):
    import_module(package)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import {package} as pl
from sparse_prune.callbacks import KernelSwap
from support.tiny import Tiny, batches, pruning, trainer
Module = type("Module", (Tiny, pl.LightningModule), {{}})
trainer({str(tmp_path)!r}, [pruning(swap=KernelSwap("gather"))], package=pl).fit(Module(), batches())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Swapped: 2 of 2 layers skip what was pruned: 2 on gather.") == 1


def test_sequences_too_short_are_told_what_would_do(tmp_path, caplog):
    def short(**changes):
        caplog.clear()
        trainer(tmp_path, [pruning(final=0.3, **changes)], steps=1).fit(TinyModule(), batches())
        return [text for text in caplog.messages if "can be pruned in sequences of" in text]

    (found,) = short(block_size=64)
    assert "At most 0.0 % of the attention" in found
    assert "(1 blocks of 64 keys), but 30.0 % is asked for" in found
    assert "Use `block_size=16` or sequences of 256 tokens; or lower `sink_blocks`" in found
    assert not short(block_size=16)  # it does
    (found,) = short(block_size=64, constraints=Constraints(protected_layers=LAYERS))
    assert "% is asked for. Lower `sink_blocks`" in found


LAYERS = tuple(f"model.model.layers.{number}.self_attn" for number in (0, 1))
