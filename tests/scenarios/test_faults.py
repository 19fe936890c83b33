"""Runs in which something goes wrong: NaN, odd batches, steps without the model, a full disk."""

import logging
import resource

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from sparse_prune.callbacks import KernelSwap, newest_checkpoint
from support.language import LanguageModule
from support.tiny import LENGTH, TinyModule, batches, pruning, tiny_llama, trainer


class LossOf(TinyModule):
    """A training step made of a function of (module, tokens, optimizer step)."""

    def __init__(self, loss):
        super().__init__()
        self.loss_of = loss

    def training_step(self, batch, batch_idx):
        return self.loss_of(self, batch, self.trainer.global_step)


def language_loss(module, batch):
    return module.model(input_ids=batch, labels=batch, use_cache=False).loss


def test_nan_loss_ends_the_run_at_the_next_decision_and_names_the_layer(tmp_path):
    module = LossOf(lambda m, batch, step: language_loss(m, batch) * (torch.nan if step == 2 else 1.0))
    callback = pruning(every_n_steps=5)
    with pytest.raises(ValueError, match=r"'model\.model\.layers\.0\.self_attn'.*2 of 2 layers.*earlier checkpoint"):
        trainer(tmp_path, [callback]).fit(module, batches())
    assert callback.report.step == 1


def overflow_at(where):
    def loss(module, batch, step):
        if step != where:
            return language_loss(module, batch)
        weight = module.model.model.layers[1].self_attn.q_proj.weight
        hook = module.model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *call: call[-1] * torch.inf)
        try:
            return language_loss(module, batch) + weight.sum() * torch.nan
        finally:
            hook.remove()

    return LossOf(loss)


def test_step_that_the_gradient_scaler_skips_is_not_decided_by(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    callback, module = pruning(every_n_steps=2, end_step=3), overflow_at(2)
    trainer(tmp_path, [callback], steps=4, plugins=[plugin]).fit(module, batches())
    assert scaler.get_scale() == 2.0
    assert callback.report.step == 4  # step 3 was skipped, so its decision fell on step 4
    assert callback.pruner.total_sparsity > 0


def test_overflow_without_a_scaler_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"'model\.model\.layers\.1\.self_attn'.*finite"):
        trainer(tmp_path, [pruning(every_n_steps=2)], steps=4).fit(overflow_at(2), batches())


def test_decision_waits_for_a_step_that_runs_the_model(tmp_path, caplog):
    def loss(module, batch, step):
        if step % 2 == 0:
            return sum(p.square().sum() for p in module.parameters())
        return language_loss(module, batch)

    callback, steps = pruning(every_n_steps=2), []
    update = callback.pruner.update
    callback.pruner.update = lambda step, reduce=None: steps.append(step) or update(step, reduce)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, [callback], steps=6).fit(LossOf(loss), batches())
    assert steps == [1, 2, 3, 4, 5, 6]
    assert callback.report.step == 6
    assert caplog.text.count("the decision waits") == 3


def test_the_warning_names_layers_that_wait(tmp_path, caplog):
    module = LossOf(lambda m, batch, step: language_loss(m, batch) if step != 4 else m.model.lm_head.weight.sum())
    module.judge = tiny_llama()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, [pruning(every_n_steps=2)], steps=6).fit(module, batches())
    (told,) = [record.getMessage() for record in caplog.records if "ran none" in record.getMessage()]
    assert "'model.model.layers.0.self_attn'" in told
    assert "judge" not in told


def test_model_called_twice_in_a_step_is_probed_in_both_calls(tmp_path):
    module = LossOf(lambda m, batch, step: language_loss(m, batch[:1]) + language_loss(m, batch[1:]))
    whole, halves = pruning(), pruning()
    trainer(tmp_path, [whole], steps=1).fit(TinyModule(), batches())
    trainer(tmp_path, [halves], steps=1).fit(module, batches())
    for name, state in whole.pruner.layers.items():
        torch.testing.assert_close(state.scores.value(), halves.pruner.layers[name].scores.value())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lengths_that_fit_no_block_and_ragged_batches(tmp_path, accumulate):
    lengths = [5, 64, 70, 1, 33, 101, 64, 8, 9, 77, 2, 64]
    data = [torch.randint(0, 32, (1 + i % 3, n)) for i, n in enumerate(lengths)] * 3
    callback, module = pruning(), TinyModule()
    fit = trainer(tmp_path, [callback, KernelSwap("gather")], accumulate_grad_batches=accumulate)
    fit.fit(module, DataLoader(data, batch_size=None))
    assert fit.global_step == 12
    assert all(loss == loss for loss, tokens in zip(module.losses, data, strict=False) if tokens.shape[1] > 1)
    assert 0 < callback.pruner.total_sparsity < 1


def test_batches_of_padding_alone_leave_scores_finite(tmp_path):
    def loss(module, batch, step):
        if step not in (0, 2, 10):
            return language_loss(module, batch)
        return module.model(input_ids=batch, attention_mask=torch.zeros_like(batch), use_cache=False).logits.sum() * 0.0

    callback = pruning()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(LossOf(loss), batches())
    for state in callback.pruner.layers.values():
        assert state.layer.mode == "sparse"
        assert torch.isfinite(state.scores.value()[:, state.layer.pattern.possible]).all()
        assert state.layer.pattern.q_len == LENGTH


def test_full_disk_is_reported_and_training_goes_on(tmp_path, caplog):
    """A limit on the size of files fails writes as a full disk does."""
    callback = pruning()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with caplog.at_level(logging.WARNING):
            fit = trainer(tmp_path, [callback, KernelSwap("gather")])
            fit.fit(TinyModule(), batches())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fit.global_step == 12
    assert "No frame of the pattern history was written" in caplog.text
    assert "patterns were not written" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_batch_of_no_sequences_is_nothing_to_decide_by(tmp_path):
    """transformers' models refuse such a batch themselves; those that take it go on, probed, masked and sparse."""

    class Empty(LanguageModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step not in (0, 3, 11):
                return super().training_step(batch, batch_idx)
            return self.model(batch[:0, :-1]).sum() * 0.0

    data = torch.randint(0, 32, (64, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    callback = pruning()
    fit = trainer(tmp_path, [callback, KernelSwap("gather")])
    fit.fit(Empty(), DataLoader(data, batch_size=2))
    assert fit.global_step == 12
    assert callback.pruner.total_sparsity == pytest.approx(0.4, abs=0.01)
    for state in callback.pruner.layers.values():
        assert state.layer.mode == "sparse"
        assert torch.isfinite(state.scores.value()[:, state.layer.pattern.possible]).all()


def test_a_checkpoint_that_does_not_fit_on_the_disk_ends_the_run_and_leaves_the_one_before(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    first = trainer(tmp_path, [pruning(), KernelSwap("gather"), saver], steps=2, enable_checkpointing=True)
    first.fit(TinyModule(), batches())
    whole = (tmp_path / "kept" / "step=2.ckpt").read_bytes()
    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    run = trainer(tmp_path, [pruning(), KernelSwap("gather"), saver], steps=4, enable_checkpointing=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.fit(TinyModule(), batches(), ckpt_path=tmp_path / "kept" / "step=2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(tmp_path / "kept").name == "step=2.ckpt"
    assert (tmp_path / "kept" / "step=2.ckpt").read_bytes() == whole
