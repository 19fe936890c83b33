"""The training step that pruning wraps runs as it is, and is the module's own again afterwards."""

import pytest

from support.tiny import TinyModule, batches, pruning, trainer


class Skipping(TinyModule):
    """It skips every batch after its first step."""

    def training_step(self, batch, batch_idx):
        return None if self.trainer.global_step else super().training_step(batch, batch_idx)


def test_a_step_that_is_skipped_stays_skipped(tmp_path):
    callback = pruning()
    run = trainer(tmp_path, [callback], steps=-1, max_epochs=1, limit_train_batches=3)
    run.fit(Skipping(), batches())
    assert callback.report.sparsity > 0


class Failing(TinyModule):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("broken")


def test_a_failing_run_leaves_the_step_as_it_was(tmp_path):
    module = Failing()
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [pruning()]).fit(module, batches())
    assert "training_step" not in vars(module)


def test_a_step_that_the_user_put_on_the_instance_is_given_back(tmp_path):
    module, steps, callback = TinyModule(), [], pruning()

    def own(batch, batch_idx):
        steps.append(batch_idx)
        return TinyModule.training_step(module, batch, batch_idx)

    module.training_step = own
    trainer(tmp_path, [callback], steps=4).fit(module, batches())
    assert callback.report.sparsity > 0
    assert steps == [0, 1, 2, 3]
    assert vars(module)["training_step"] is own


class Fetching(TinyModule):
    """Takes its batches itself, so that Lightning knows no batch size."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


def test_a_step_that_fetches_its_batches_is_probed(tmp_path):
    callback = pruning()
    trainer(tmp_path, [callback], steps=4).fit(Fetching(), batches())
    assert callback.report.sparsity > 0
