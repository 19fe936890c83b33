"""What a schedule asks for is held against what can be had."""

import logging

import pytest

from sparse_prune import Constraints, CubicSchedule
from sparse_prune.callbacks import AttentionPruning, KernelSwap
from support.tiny import BLOCK, TinyModule, batches, pruning, trainer


def warnings(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize(
    ("changes", "share"),
    [({"block_size": 64}, "0.0 %"), ({"constraints": Constraints(sink_blocks=4)}, "16.7 %"), ({}, None)],
)
def test_what_constraints_forbid_is_told_once(tmp_path, caplog, changes, share):
    callback = pruning(**changes)
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=8).fit(TinyModule(), batches())
    told = warnings(caplog, "can be pruned in sequences like those")
    assert len(told) == (share is not None)
    if share is not None:
        assert told[0].startswith(f"At most {share}")
        assert "40.0 % is asked for" in told[0]
        assert f"At most {100 * callback.pruner.total_sparsity:.1f} %" in told[0]


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
