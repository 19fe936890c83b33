"""What would cost a run is refused or told: Trainers, the length of the run, what a schedule asks for."""

import logging

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from sparse_prune import ConstantSchedule, Constraints, CubicSchedule, LinearSchedule, swap_timer
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from sparse_prune.callbacks.checks import earliest_settling
from support.tiny import BLOCK, TinyModule, batches, pruning, trainer


def test_steps_of_numpy_are_counted_and_true_is_no_count():
    assert type(pruning(every_n_steps=np.int64(10)).every_n_steps) is int
    with pytest.raises(ValueError, match="`every_n_steps` must be a whole number"):
        pruning(every_n_steps=True)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_training_in_copies_of_the_process_is_refused(tmp_path, strategy):
    callback = pruning()
    fit = trainer(tmp_path, [callback], strategy=strategy, devices=2)
    with pytest.raises(ValueError, match="as ddp_spawn, ddp_fork and ddp_notebook do.*Use strategy='ddp'"):
        callback.setup(fit, TinyModule(), "fit")
    callback.setup(fit, TinyModule(), "test")  # nothing is lost there
    callback.setup(trainer(tmp_path, [callback], strategy="ddp", devices=2), TinyModule(), "fit")


class Pruning(type(pruning())):
    """Another name, another key for its state: Lightning itself lets both in."""


def test_a_second_pruning_callback_is_refused(tmp_path):
    second = Pruning(pruning().pruner.sparsity, block_size=8)
    with pytest.raises(
        ValueError, match="must hold one AttentionPruning, got 2. Its `module` may name the common parent"
    ):
        trainer(tmp_path, [pruning(), second]).fit(TinyModule(), batches())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttentionPruning`"):
        trainer(tmp_path, [pruning(module="model"), pruning(module="other")])


def in_shares(end_step=0.5, **changes):
    return AttentionPruning(CubicSchedule(final=0.4, end_step=end_step), block_size=BLOCK, every_n_steps=1, **changes)


class Requests(Callback):
    """What the schedule asked for, decision by decision."""

    def __init__(self, callback):
        self.callback, self.found = callback, []

    def on_train_batch_end(self, *args):
        self.found.append(self.callback.report.requested)


def run(path, callback, steps=6, ckpt=None, extra=(), **changes):
    watch = Requests(callback)
    settings = {"steps": steps, "enable_checkpointing": bool(extra), **changes}
    trainer(path, [callback, KernelSwap("gather"), watch, *extra], **settings).fit(
        TinyModule(), batches(12), ckpt_path=ckpt
    )
    return watch.found


@pytest.mark.parametrize("changes", [{"steps": 12}, {"steps": -1, "max_epochs": 2}])
def test_a_share_is_that_of_the_optimizer_steps(tmp_path, changes):
    steps = CubicSchedule(final=0.4, end_step=6)
    assert run(tmp_path, in_shares(), **changes) == [steps(step) for step in range(1, 13)]


@pytest.mark.parametrize(("steps", "end"), [(-1, 7), (4, 2)])
def test_a_run_whose_accumulation_changes_is_counted_epoch_by_epoch(tmp_path, steps, end):
    callback, scheduler = in_shares(), GradientAccumulationScheduler({0: 1, 1: 4, 2: 7})
    fit = trainer(
        tmp_path, [callback, KernelSwap("gather"), scheduler], steps=steps, max_epochs=3, limit_train_batches=9
    )
    fit.fit(TinyModule(), batches())
    assert fit.global_step == (14 if steps == -1 else steps)
    assert callback.pruner.schedule.end_step == end


def test_a_threshold_may_ramp_over_a_share_too(tmp_path):
    callback = AttentionPruning(threshold=LinearSchedule(final=0.2, end_step=0.5), block_size=BLOCK, every_n_steps=1)
    assert run(tmp_path, callback, steps=4) == pytest.approx([0.1, 0.2, 0.2, 0.2])


def test_a_resumed_run_of_another_length_keeps_its_steps(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3)
    whole = run(tmp_path / "whole", in_shares())
    first = run(tmp_path / "first", in_shares(), extra=[saver, StopAfter(3)])
    resumed = in_shares()
    second = run(
        tmp_path / "second", resumed, steps=12, ckpt=tmp_path / "cut.ckpt", extra=[ModelCheckpoint(tmp_path / "x")]
    )
    assert first + second[:3] == whole
    assert resumed.pruner.schedule == CubicSchedule(final=0.4, end_step=3)
    assert run(tmp_path / "new", resumed, steps=4) == [CubicSchedule(final=0.4, end_step=2)(s) for s in (1, 2, 3, 4)]


def test_a_yaml_file_may_hold_steps_or_shares():
    parser = ArgumentParser()
    parser.add_class_arguments(AttentionPruning, "pruning")
    for written, meant in (("0.5", 0.5), ("1.0", 1.0), ("1", 1), ("800", 800)):
        schedule = f"{{class_path: sparse_prune.CubicSchedule, init_args: {{final: 0.4, end_step: {written}}}}}"
        config = parser.parse_string(f"pruning: {{sparsity: {schedule}}}")
        found = parser.instantiate_classes(config).pruning.pruner.schedule
        assert (found.end_step, type(found.end_step)) == (meant, type(meant))


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


class Stream(IterableDataset):
    def __iter__(self):
        return iter(batches().dataset)


class ByHand(TinyModule):
    automatic_optimization = False


@pytest.mark.parametrize(("module", "data"), [(TinyModule, DataLoader(Stream(), batch_size=2)), (ByHand, batches())])
def test_a_share_of_a_run_of_unknown_length_is_refused(tmp_path, module, data):
    fit = trainer(tmp_path, [in_shares()], steps=-1, max_epochs=1)
    with pytest.raises(ValueError, match=r"in a run of unknown length.*got 0 and 0\.5.*max_steps"):
        fit.fit(module(), data)


@pytest.mark.parametrize(("end", "every", "patience"), [(6, 1, 2), (6, 2, 3), (5, 2, 1), (0, 3, 2), (1, 3, 1)])
def test_layers_settle_no_earlier_than_forecast(tmp_path, end, every, patience):
    callback = pruning(end_step=end, every_n_steps=every, patience=patience, min_delta=1.0)
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=14).fit(TinyModule(), batches())
    settled = {state.settled_at for state in callback.pruner.layers.values()}
    assert settled == {earliest_settling(callback.pruner.schedule, every, patience)}


@pytest.mark.parametrize(
    ("end", "steps", "changes", "warned"),
    [
        (50, 2, {}, True),
        (18, 20, {"every_n_steps": 10, "patience": 3}, True),
        (3, 4, {"patience": 2}, False),
        (3, 3, {"patience": 2}, True),
        (0.5, 4, {"patience": 2}, False),
        (1.0, 4, {"patience": 2}, True),
    ],
)
def test_a_run_that_ends_before_layers_can_settle_warns(tmp_path, caplog, end, steps, changes, warned):
    trainer(tmp_path, [pruning(end_step=end, **changes)], steps=steps).fit(TinyModule(), batches())
    assert ("no layer will settle" in caplog.text) == warned


def test_fast_dev_run_says_nothing_of_settling(tmp_path, caplog):
    trainer(tmp_path, [pruning()], fast_dev_run=True).fit(TinyModule(), batches())
    assert "no layer will settle" not in caplog.text


@pytest.mark.parametrize(
    ("schedule", "warned"),
    [
        (CubicSchedule(final=0.4, end_step=3), "first decision asks for 0.4 at once"),
        (CubicSchedule(final=0.4, begin_step=4, end_step=6), None),
        (ConstantSchedule(final=0.4), None),
    ],
)
def test_a_ramp_that_lies_behind_a_resumed_dense_run_warns(tmp_path, caplog, schedule, warned):
    saver = ModelCheckpoint(tmp_path, filename="dense", every_n_train_steps=4)
    trainer(tmp_path, [saver], steps=4, enable_checkpointing=True).fit(TinyModule(), batches())
    callback = AttentionPruning(schedule, block_size=BLOCK, every_n_steps=1)
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=6).fit(
        TinyModule(), batches(), ckpt_path=tmp_path / "dense.ckpt"
    )
    assert callback.report.step == 6
    assert ("resumes at step 4 without pruning so far" in caplog.text) == (warned is not None)
    assert warned is None or warned in caplog.text


def test_going_on_with_a_pruned_run_draws_no_warning(tmp_path, caplog):
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=4)
    trainer(tmp_path, [pruning(), saver], steps=4, enable_checkpointing=True).fit(TinyModule(), batches())
    trainer(tmp_path, [pruning()], steps=9).fit(TinyModule(), batches(), ckpt_path=tmp_path / "cut.ckpt")
    assert "without pruning so far" not in caplog.text


def warnings(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"block_size": 64}, "0.0 %"), ({"constraints": Constraints(sink_blocks=4)}, "16.7 %"), ({}, None)],
)
def test_what_constraints_forbid_is_told_once(tmp_path, caplog, changes, share):
    callback = pruning(**changes)
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=8).fit(TinyModule(), batches())
    told = warnings(caplog, "can be pruned in sequences of")
    assert len(told) == (share is not None)
    if share is not None:
        assert told[0].startswith(f"At most {share}")
        assert "40.0 % is asked for" in told[0]
        assert f"At most {100 * callback.pruner.total_sparsity:.1f} %" in told[0]


class FirstUpdate(Callback):
    """What was told before any weight had changed."""

    def __init__(self, caplog):
        self.caplog, self.told = caplog, None

    def on_before_optimizer_step(self, *args):
        if self.told is None:
            self.told = list(self.caplog.messages)


def test_what_cannot_be_won_is_told_before_the_first_update(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: {"dense": 1.0, "gather": 2.0})
    first = FirstUpdate(caplog)
    trainer(tmp_path, [pruning(block_size=16, final=0.6), first], steps=1).fit(TinyModule(), batches())
    assert any("At most 30.0 % of the attention can be pruned in sequences of 64 tokens" in text for text in first.told)
    assert any("not expected to make this run faster" in text for text in first.told)


@pytest.mark.parametrize(("saved", "settled"), [(2, False), (12, True)])
def test_another_schedule_on_resume_is_told(tmp_path, caplog, saved, settled):
    first = trainer(tmp_path, [pruning(), KernelSwap("gather")], steps=saved)
    module = TinyModule()
    first.fit(module, batches())
    first.save_checkpoint(tmp_path / "a.ckpt")
    for final, changed in ((0.4, False), (0.5, True)):
        caplog.clear()
        again = trainer(tmp_path, [pruning(final=final), KernelSwap("gather")], steps=saved + 1)
        with caplog.at_level(logging.INFO, "sparse_prune.callbacks"):
            again.fit(module, batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        told = warnings(caplog, "The schedule was")
        assert len(told) == changed
        assert not changed or ("changes nothing" in told[0]) == settled


@pytest.mark.parametrize(
    ("second", "back"),
    [(CubicSchedule(final=0.5, end_step=4), True), (CubicSchedule(final=0.5, end_step=4, initial=0.4), False)],
)
def test_connections_that_a_pruned_model_gets_back_are_told(tmp_path, caplog, second, back):
    module = TinyModule()
    trainer(tmp_path, [pruning(), KernelSwap("gather")]).fit(module, batches())
    words = "the first decision gives connections back"
    assert not warnings(caplog, words)
    callback = AttentionPruning(second, block_size=BLOCK, every_n_steps=1)
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=1).fit(module, batches())
    assert bool(warnings(caplog, words)) == back
    assert (callback.pruner.total_sparsity < 0.39) == back


def test_a_backend_that_cannot_train_here_ends_the_run_before_its_first_step(tmp_path):
    module = TinyModule()
    with pytest.raises(ValueError, match="`backend='flex'` must train on a CUDA device, got cpu"):
        trainer(tmp_path, [pruning(), KernelSwap("flex")]).fit(module, batches())
    assert not module.losses
