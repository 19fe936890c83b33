"""A resumed run draws the random numbers of the unbroken one: dropout, and what a user's step draws by itself."""

import io
import random

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from sparse_prune import distributed
from sparse_prune.callbacks import KernelSwap
from sparse_prune.callbacks.randomness import Randomness, random_state, set_random_state
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer


class Noisy(TinyModule):
    """Dropout of attention, and a step that draws from every generator."""

    def __init__(self):
        super().__init__(tiny_llama(attention_dropout=0.2).train())
        self.drawn = []

    def training_step(self, batch, batch_idx):
        self.drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return super().training_step(batch, batch_idx)


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def run(path, seed, extra=(), ckpt=None, data=batches, **length):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    module, callback = Noisy(), pruning(every_n_steps=2, patience=1, swap=KernelSwap("gather"))
    torch.manual_seed(seed)
    fit = trainer(path, [callback, *extra], **{"enable_checkpointing": bool(extra), **length})
    fit.fit(module, data(), ckpt_path=ckpt, weights_only=False)
    return module, callback


def shuffled():
    tokens = torch.randint(0, 32, (8, 64), generator=torch.Generator().manual_seed(1))
    return DataLoader(tokens, batch_size=2, shuffle=True)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_with_dropout_repeats_on_either_side_of_a_swap(tmp_path, stop):
    whole, callback = run(tmp_path / "whole", seed=1)
    assert [layer.mode for layer in (s.layer for s in callback.pruner.layers.values())] == ["sparse", "sparse"]
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=stop)
    first, before = run(tmp_path / "first", 1, [saver, StopAfter(stop)])
    assert {s.layer.mode for s in before.pruner.layers.values()} == {"masked" if stop == 3 else "sparse"}
    second, _ = run(tmp_path / "second", 2, [ModelCheckpoint(tmp_path / "x")], tmp_path / "cut.ckpt")
    assert first.drawn + second.drawn == whole.drawn
    assert first.losses + second.losses == whole.losses


def test_a_run_resumed_between_epochs_shuffles_as_the_unbroken_one(tmp_path):
    three = {"data": shuffled, "steps": -1, "max_epochs": 3}
    whole, _ = run(tmp_path / "whole", 1, **three)
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_epochs=1, save_on_train_epoch_end=True)
    first, _ = run(tmp_path / "first", 1, [saver], **three | {"max_epochs": 1})
    second, _ = run(tmp_path / "second", 2, [ModelCheckpoint(tmp_path / "x")], tmp_path / "cut.ckpt", **three)
    assert len(first.losses) == 4
    assert first.drawn + second.drawn == whole.drawn
    assert first.losses + second.losses == whole.losses


def test_the_state_is_of_plain_types_and_comes_back():
    torch.manual_seed(3)
    file = io.BytesIO()
    torch.save(random_state(), file)
    wanted = random.random(), np.random.rand(), np.random.randn(), torch.rand(2)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    found = random.random(), np.random.rand(), np.random.randn(), torch.rand(2)
    assert found[:3] == wanted[:3]
    assert torch.equal(found[3], wanted[3])


class PretendGPUs:
    """Stands for torch.cuda: a generator for each device."""

    def __init__(self, monkeypatch, count, current=0):
        self.generators = [torch.Generator().manual_seed(100 + gpu) for gpu in range(count)]
        for name, value in {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "current_device": lambda: current,
            "get_rng_state": lambda gpu: self.generators[gpu].get_state(),
            "set_rng_state": lambda state, gpu: self.generators[gpu].set_state(state),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def draw(self, seed=None):
        if seed is not None:
            for generator in self.generators:
                generator.manual_seed(seed)
        return [torch.rand((), generator=generator).item() for generator in self.generators]


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_gpu_goes_on_where_it_was(monkeypatch):
    gpus = PretendGPUs(monkeypatch, 3, current=1)
    state = saved(random_state())
    wanted = gpus.draw()
    assert len(set(wanted)) == 3
    gpus.draw(seed=0)
    set_random_state(state)
    assert gpus.draw() == wanted
    # Where fewer are visible, the process's own one has another number, and goes on.
    alone = PretendGPUs(monkeypatch, 1)
    set_random_state(state)
    assert alone.draw() == [wanted[1]]


def test_a_checkpoint_of_gpus_is_resumed_on_a_cpu_and_the_other_way_round(monkeypatch):
    PretendGPUs(monkeypatch, 2)
    of_gpus = Randomness()
    state = saved(of_gpus.state())
    wanted = torch.rand(())
    PretendGPUs(monkeypatch, 0)
    torch.manual_seed(9)
    of_gpus.load_state(state)
    of_gpus.begin_fit()
    assert torch.rand(()) == wanted
    state = saved(Randomness().state())
    gpus = PretendGPUs(monkeypatch, 2)
    expected = PretendGPUs(monkeypatch, 2).draw()
    of_gpus.load_state(state)
    of_gpus.begin_fit()
    assert gpus.draw() == expected  # nothing is known of theirs


def test_every_process_gets_its_own_and_another_number_of_them_is_said(monkeypatch, caplog):
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(random_state())
    monkeypatch.setattr("sparse_prune.callbacks.randomness.rank", lambda: (1, 2))
    mine = Randomness()
    mine.load_state({"within_epoch": True, "ranks": states})
    mine.begin_fit()
    mine.begin_training()
    assert torch.equal(torch.get_rng_state(), states[1]["torch"])
    assert not caplog.records
    monkeypatch.setattr("sparse_prune.callbacks.randomness.rank", lambda: (0, 3))
    mine.load_state({"within_epoch": True, "ranks": states})
    mine.begin_fit()
    mine.begin_training()
    (record,) = caplog.records
    assert "random state of 2 processes, but this run has 3" in record.getMessage()
    assert distributed.from_all_ranks("alone") == ["alone"]
