"""Trainers under which pruning would fail late, or be lost, are refused before training."""

import numpy as np
import pytest

from support.tiny import TinyModule, batches, pruning, trainer


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
        ValueError, match="must hold one AttentionPruning, got 2. Its `module` may name a common parent"
    ):
        trainer(tmp_path, [pruning(), second]).fit(TinyModule(), batches())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttentionPruning`"):
        trainer(tmp_path, [pruning(module="model"), pruning(module="other")])
