"""The dense model teaches the pruned one: what is added to the loss, when, and what stays as it was."""

import pytest
import torch
from torch import nn

from sparse_prune.attention import attach
from sparse_prune.callbacks import Distillation, KernelSwap
from sparse_prune.distillation import DenseTeacher, divergence
from sparse_prune.evaluation import all_connections
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer


def test_divergence_is_that_of_torch_and_leaves_masked_positions_out():
    student, teacher = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    one, other = (torch.distributions.Categorical(logits=logits / 2.0) for logits in (teacher, student))
    expected = 4.0 * torch.distributions.kl_divergence(one, other)
    torch.testing.assert_close(divergence(student, teacher, 2.0), expected.mean())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(divergence(student, teacher, 2.0, mask), expected[mask.bool()].mean())
    assert divergence(student, student) == 0
    assert divergence(student, teacher, mask=torch.zeros(2, 3)) == 0


class ByHand(TinyModule):
    """Adds what the callback should add, where it should."""

    def __init__(self, callback, weight, whole_run):
        super().__init__()
        self.pruning, self.weight, self.whole_run = [callback], weight, whole_run
        self.taught = 0

    def training_step(self, batch, batch_idx):
        out = self.model(input_ids=batch, labels=batch, use_cache=False)
        pruner = self.pruning[0].pruner
        lost = any(state.layer.mode != "dense" for state in pruner.layers.values())
        if not (lost and (self.whole_run or pruner.open_layers)):
            return out.loss
        self.taught += 1
        pruner.probe(False)
        with torch.no_grad(), all_connections(self.model):
            wanted = self.model(input_ids=batch, use_cache=False).logits.softmax(-1)
        found = out.logits.log_softmax(-1)
        return out.loss + self.weight * (wanted * (wanted.log() - found)).sum(-1).mean()


@pytest.mark.parametrize("after_ramp", [False, True])
def test_the_divergence_is_added_to_the_loss_as_if_by_hand(tmp_path, after_ramp):
    plain = pruning()
    by_hand = ByHand(plain, 2.0, after_ramp)
    trainer(tmp_path, [plain, KernelSwap("gather")], accumulate_grad_batches=2).fit(by_hand, batches())
    taught = pruning(distillation=Distillation(weight=2.0, after_ramp=after_ramp))
    module = TinyModule()
    trainer(tmp_path, [taught, KernelSwap("gather")], accumulate_grad_batches=2).fit(module, batches())
    assert by_hand.taught == (22 if after_ramp else 12)  # from the first lost block on, to the settling at step 7
    for one, other in zip(by_hand.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not taught.pruner.open_layers
    assert "training_step" not in vars(module)


class Watching(TinyModule):
    """With dropout, and steps of its own kind."""

    def __init__(self, step=None, **config):
        super().__init__(tiny_llama(attention_dropout=0.5, **config))
        self.step_of = step

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "extra": 1} if self.step_of is None else self.step_of(self, loss)


def logged(run):
    return {key: float(value) for key, value in run.callback_metrics.items()}


def test_a_step_that_returns_a_dict_is_taught_without_dropout_in_the_teacher(tmp_path):
    module, callback = Watching(), pruning(distillation=Distillation())
    run = trainer(tmp_path, [callback], steps=4)
    run.fit(module, batches())
    assert logged(run)["prune/divergence"] > 0
    assert all(part.training for part in module.modules())


def test_the_teacher_is_neither_probed_nor_remembered():
    model = tiny_llama()
    handles = attach(model)
    teacher = DenseTeacher(model, handles)
    tokens = next(iter(batches()))
    for handle in handles:
        handle.probe_block_size = (8, 8)
    with teacher.watch():
        model(input_ids=tokens)
    counts = [handle.statistics.counts.clone() for handle in handles]
    assert teacher.loss() == 0  # nothing is pruned
    for handle, count in zip(handles, counts, strict=True):
        assert torch.equal(handle.statistics.counts, count)
        assert handle.probe_block_size == (8, 8)
    assert teacher.loss() is None


def test_a_step_that_is_skipped_stays_skipped(tmp_path):
    module = Watching(lambda self, loss: None if self.trainer.global_step else loss)
    callback = pruning(distillation=Distillation())
    trainer(tmp_path, [callback], steps=-1, max_epochs=1, limit_train_batches=3).fit(module, batches())
    assert callback.report.sparsity > 0


def test_a_failing_run_leaves_the_step_as_it_was(tmp_path):
    def fail(self, loss):
        raise RuntimeError("broken")

    module = Watching(fail)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, [pruning(distillation=Distillation())]).fit(module, batches())
    assert "training_step" not in vars(module)


def test_a_step_that_the_user_put_on_the_instance_is_given_back(tmp_path):
    module, steps = TinyModule(), []

    def own(batch, batch_idx):
        steps.append(batch_idx)
        return TinyModule.training_step(module, batch, batch_idx)

    module.training_step = own
    run = trainer(tmp_path, [pruning(distillation=Distillation())], steps=4)
    run.fit(module, batches())
    assert logged(run)["prune/divergence"] > 0
    assert steps == [0, 1, 2, 3]
    assert vars(module)["training_step"] is own


class Fetching(TinyModule):
    """Takes its batches itself, so that Lightning knows no batch size."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss


def test_a_step_that_fetches_its_batches_is_taught(tmp_path):
    run = trainer(tmp_path, [pruning(distillation=Distillation())], steps=4)
    run.fit(Fetching(), batches())
    assert logged(run)["prune/divergence"] > 0


class Manual(TinyModule):
    automatic_optimization = False


class Flat(TinyModule):
    """No child holds all layers."""

    def __init__(self):
        super().__init__()
        layers = self.model.model.layers
        self.first, self.second = layers[0], layers[1]
        self.model_of = [self.model]
        del self.model

    def training_step(self, batch, batch_idx):
        return self.model_of[0](input_ids=batch, labels=batch).loss


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Manual, {}, "`distillation` needs automatic optimization, got Manual"),
        (TinyModule, {"module": "head"}, r"`Distillation.module` must name a module of TinyModule, got 'head'"),
        (Flat, {}, r"`Distillation.module` must be given for Flat: none of its children \['first', 'second'\]"),
        (TinyModule, {"module": "model.model"}, "or has `logits`, got BaseModelOutputWithPast"),
    ],
)
def test_what_cannot_be_taught_is_refused(tmp_path, module, settings, message):
    callback = pruning(distillation=Distillation(**settings))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [callback]).fit(module(), batches())


@pytest.mark.parametrize("name", ["weight", "temperature"])
def test_numbers_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0"):
        Distillation(**{name: 0})


def test_a_model_that_returns_logits_is_taught():
    model = nn.Sequential(nn.Linear(4, 3))
    teacher = DenseTeacher(model, [])
    with teacher.watch():
        model(torch.ones(2, 4))
    assert teacher.loss() == 0
