from dataclasses import dataclass

import pytest

from sparse_prune import AttentionPruner, Schedule
from sparse_prune.callbacks import AttentionPruning
from support.tiny import BLOCK, TinyModule, batches, trainer


@dataclass(frozen=True)
class Halfway(Schedule):
    """Half of the way at once, the rest at the end: added as CONTRIBUTING says."""

    def shape(self, progress: float) -> float:
        return 1.0 if progress >= 1.0 else 0.5


def test_a_schedule_that_is_added_prunes_as_its_shape_says(tmp_path):
    pruning = AttentionPruning(Halfway(final=0.4, end_step=6), block_size=BLOCK, every_n_steps=1)
    asked = []
    module = TinyModule()
    step = module.training_step

    def watched(batch, batch_idx):
        if pruning.report is not None:
            asked.append(pruning.report.requested)
        return step(batch, batch_idx)

    module.training_step = watched
    trainer(tmp_path, [pruning], steps=8).fit(module, batches())
    assert asked[:5] == pytest.approx([0.2] * 5)
    assert asked[-1] == pytest.approx(0.4)
    assert pruning.pruner.total_sparsity == pytest.approx(0.4, abs=0.02)


def test_its_words_name_it():
    schedule = Halfway(final=0.4, end_step=6)
    assert repr(schedule).startswith("Halfway(")
    assert AttentionPruner(schedule).schedule == schedule
