"""The pruned model of a checkpoint, without a Trainer."""

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from sparse_prune import CubicSchedule
from sparse_prune.callbacks import AttentionPruning, KernelSwap, restore_patterns
from sparse_prune.export import load, save_pretrained
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module that was pruned, and checkpoints of it: while patterns move, swapped, before all pruning, dense."""
    folder, module = tmp_path_factory.mktemp("trained"), TinyModule()
    savers = [ModelCheckpoint(folder, filename=f"at{step}", every_n_train_steps=step) for step in (4, 12)]
    fit = trainer(folder, [pruning(), KernelSwap("gather"), *savers], enable_checkpointing=True)
    fit.fit(module, batches())
    fit.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    dense = trainer(folder, [], steps=1)
    dense.fit(TinyModule(), batches())
    dense.save_checkpoint(folder / "dense.ckpt")
    return folder, module


@torch.no_grad()
def logits(module):
    return module.model.eval()(next(iter(batches())), use_cache=False).logits


def test_a_checkpoint_gives_the_pruned_model(trained, tmp_path):
    folder, module = trained
    again = TinyModule.load_from_checkpoint(folder / "at12.ckpt")
    assert not torch.equal(logits(again), logits(module))
    found = restore_patterns(again, folder / "at12.ckpt")
    assert torch.equal(logits(again), logits(module))
    assert list(found) == [f"model.model.layers.{i}.self_attn" for i in (0, 1)]
    assert torch.equal(
        logits(type("", (), {"model": load(save_pretrained(again.model, tmp_path / "out"))})), logits(again)
    )


class Subclass(AttentionPruning):
    """Its state lies under its own name."""


def test_a_subclass_leaves_patterns_too(tmp_path):
    callback, module = Subclass(CubicSchedule(final=0.4, end_step=1), block_size=8, every_n_steps=1), TinyModule()
    fit = trainer(tmp_path, [callback], steps=2)
    fit.fit(module, batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = TinyModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert restore_patterns(again, tmp_path / "a.ckpt").keys() == callback.pruner.patterns.keys()
    assert torch.equal(logits(again), logits(module))


def test_patterns_that_still_moved_are_restored_too(trained):
    folder, _ = trained
    again = TinyModule.load_from_checkpoint(folder / "at4.ckpt")
    dense = logits(again)
    found = restore_patterns(again, folder / "at4.ckpt", module="model")
    assert all(0 < pattern.sparsity < 0.5 for pattern in found.values())
    assert not torch.equal(logits(again), dense)


def test_a_sharded_checkpoint_is_a_folder(trained, tmp_path):
    folder, module = trained
    state = torch.load(folder / "at12.ckpt", weights_only=False)
    torch.save({name: part for name, part in state.items() if name != "state_dict"}, tmp_path / "meta.pt")
    again = TinyModule.load_from_checkpoint(folder / "at12.ckpt")
    restore_patterns(again, tmp_path)
    assert torch.equal(logits(again), logits(module))


def test_what_holds_no_pruning_of_this_model_is_refused(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match="`path` must be a checkpoint of a run with AttentionPruning"):
        restore_patterns(TinyModule(), folder / "dense.ckpt")
    with pytest.raises(ValueError, match="The checkpoint is of another model"):
        restore_patterns(TinyModule(tiny_llama(num_hidden_layers=3)), folder / "at12.ckpt")
    for missing in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(FileNotFoundError, match="`path` must be a checkpoint, got"):
            restore_patterns(TinyModule(), missing)


@pytest.mark.parametrize(("name", "told"), [("weights", True), ("dense", True), ("at12", False)])
def test_a_checkpoint_that_brings_no_patterns_to_an_evaluation_is_told(trained, tmp_path, caplog, name, told):
    folder, _ = trained
    callback, path = pruning(), folder / f"{name}.ckpt"
    run = trainer(tmp_path, [callback, KernelSwap("gather")])
    run.test(TinyModule(), batches(4), ckpt_path=path, verbose=False)
    assert (f"The checkpoint {path} holds no pruning" in caplog.text) == told
    assert bool(callback.pruner.patterns) != told
    caplog.clear()
    run.test(TinyModule(), batches(4), verbose=False)
    assert "holds no pruning" not in caplog.text
