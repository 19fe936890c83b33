"""The same callback on models that are no transformers'."""

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from sparse_prune.callbacks import KernelSwap
from sparse_prune.recipes.base.loader import ResumableDataLoader
from support.language import HEADS, WIDTH, LanguageModule
from support.tiny import LENGTH, pruning, trainer


class Classifier(LanguageModule):
    """nn.TransformerEncoder over padded sequences; token 0 is padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.1, batch_first=True)
        self.embed, self.model, self.head = (
            nn.Embedding(32, WIDTH),
            nn.TransformerEncoder(layer, 2),
            nn.Linear(WIDTH, 2),
        )

    def forward(self, batch):
        real = batch != 0
        states = self.model(self.embed(batch), src_key_padding_mask=~real)
        return self.head((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch), batch[:, 0] % 2)
        self.losses.append(loss.item())
        return loss


def batches():
    tokens = torch.randint(1, 32, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[::2, LENGTH - 10 :] = 0
    return ResumableDataLoader(tokens, batch_size=2)


def run(path, module, steps=12, ckpt=None, **changes):
    callback = pruning(every_n_steps=2, patience=1)
    torch.manual_seed(7)
    fit = trainer(path, [callback, KernelSwap("gather"), *changes.pop("extra", [])], steps=steps, **changes)
    fit.fit(module, batches(), ckpt_path=ckpt, weights_only=False)
    return callback


@pytest.mark.parametrize("kind", [LanguageModule, Classifier])
def test_prunes_settles_swaps_and_resumes(tmp_path, kind):
    whole, first, second = kind(), kind(), kind()
    names = list(whole.state_dict())
    callback = run(tmp_path / "whole", whole)
    states = callback.pruner.layers.values()
    assert {state.layer.mode for state in states} == {"sparse"}
    assert callback.pruner.total_sparsity == pytest.approx(0.4, abs=0.02)
    assert list(whole.state_dict()) == names
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=5)
    run(tmp_path / "first", first, steps=5, extra=[saver], enable_checkpointing=True)
    resumed = run(tmp_path / "second", second, ckpt=tmp_path / "cut.ckpt")
    for name, pattern in callback.pruner.patterns.items():
        assert resumed.pruner.patterns[name].keep.shape == pattern.keep.shape
    assert [state.layer.mode for state in resumed.pruner.layers.values()] == ["sparse"] * 2
    assert len(first.losses) + len(second.losses) == 12


@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("kind", [LanguageModule, Classifier])
def test_resume_without_dropout_on_either_side_of_the_swap_repeats_the_unbroken_run(tmp_path, kind, stop):
    def make():
        module = kind()
        for part in module.modules():
            part.eval()
        return module

    whole, first, second = make(), make(), make()
    expected = run(tmp_path / "whole", whole)
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=stop)
    run(tmp_path / "first", first, steps=stop, extra=[saver], enable_checkpointing=True)
    resumed = run(tmp_path / "second", second, ckpt=tmp_path / "cut.ckpt")
    assert first.losses + second.losses == whole.losses
    for name, pattern in expected.pruner.patterns.items():
        assert torch.equal(resumed.pruner.patterns[name].keep, pattern.keep)


@torch.no_grad()
def test_pruned_classifier_uses_its_pattern_under_the_fast_paths_conditions(tmp_path):
    module = Classifier()
    callback = run(tmp_path, module)
    module.eval()
    batch = next(iter(batches()))
    sparse = module(batch)
    layers = [state.layer for state in callback.pruner.layers.values()]
    for layer in layers:
        layer.mode = "masked"
    torch.testing.assert_close(module(batch), sparse, atol=1e-5, rtol=1e-4)
    for layer in layers:
        layer.mode = "dense"
    assert (module(batch) - sparse).abs().max() > 1e-4


@pytest.mark.slow
def test_compiled_model_gives_the_same_patterns(tmp_path):
    def run_without_dropout(compiled):
        module = LanguageModule(compiled).eval()
        return run(tmp_path, module), module

    (eager, one), (compiled, other) = (run_without_dropout(flag) for flag in (False, True))
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    for name, pattern in eager.pruner.patterns.items():
        assert torch.equal(compiled.pruner.patterns[name].keep, pattern.keep)
