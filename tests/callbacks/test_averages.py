"""Averages of the weights (EMA) are validated with the patterns of the model that they average, or it is said."""

import copy
import logging
import pickle

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_prune.attention import attach, detach, handle_of
from sparse_prune.attention.averages import averaged_layers, likely_copies
from sparse_prune.callbacks import KernelSwap
from support.nano import NanoGPT
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer


class WithAverage(TinyModule):
    """As users write it: trained by `model`, validated by `ema`."""

    def __init__(self, model=None, average=True):
        super().__init__(model)
        if average:
            self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def on_train_batch_end(self, *args):
        self.ema.update_parameters(self.model)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.ema(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


class LateAverage(WithAverage):
    def __init__(self):
        super().__init__(average=False)

    def on_train_start(self):  # behind the callbacks': the copy brings handles of its own along
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


class PlainCopy(WithAverage):
    def __init__(self):
        super().__init__(average=False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)

    def on_train_batch_end(self, *args):
        pass


def handles(module):
    return {n: h for n, m in module.named_modules() if (h := handle_of(m)) is not None}


@pytest.mark.parametrize("kind", [WithAverage, LateAverage])
@pytest.mark.parametrize("part", [None, "model"])
def test_an_average_inside_of_the_module_has_the_students_patterns(tmp_path, kind, part):
    module, callback = kind(), pruning(module=part, swap=KernelSwap("gather"))
    fit = trainer(tmp_path, [callback], steps=8, val_check_interval=4)
    fit.fit(module, batches(), batches(8))
    assert set(callback.pruner.layers) == {f"model.model.layers.{i}.self_attn" for i in (0, 1)}
    assert callback.pruner.total_sparsity > 0.3
    found = handles(module)
    assert len(found) == 4
    for i in (0, 1):
        name = f"model.layers.{i}.self_attn"
        assert found[f"ema.module.{name}"] is found[f"model.{name}"]
    # Its output is that of the same weights in the student's place.
    (batch, *_) = batches()
    with torch.no_grad():
        wanted = tiny_llama()
        wanted.load_state_dict(module.ema.module.state_dict())
        for name, handle in handles(module.model).items():
            (other,) = [h for n, h in {h.name: h for h in attach(wanted)}.items() if n == name]
            other.pattern, other.mode, other.backend = handle.pattern, handle.mode, handle.backend
        assert torch.equal(module.ema(input_ids=batch).logits, wanted(input_ids=batch).logits)
        detach(wanted)
        assert not torch.allclose(module.ema(input_ids=batch).logits, wanted(input_ids=batch).logits)


def test_an_average_and_its_model_survive_pickling_and_detach():
    module = WithAverage()
    module.ema.multi_avg_fn = None  # torch's is a local function
    attach(module)
    (batch, *_) = batches()
    wanted = [m(input_ids=batch).logits for m in (module.model, module.ema)]
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = handles(again)
        assert len({id(handle) for handle in found.values()}) == 2
        for model, logits in zip((again.model, again.ema), wanted, strict=True):
            assert torch.equal(model(input_ids=batch).logits, logits)
            config = (model if model is again.model else model.module).config
            assert config._attn_implementation == "sparse_prune"
    detach(module)
    assert not handles(module)
    assert module.ema.module.config._attn_implementation == "sdpa"


def test_an_average_of_a_module_that_calls_sdpa_shares_handles_too():
    module = torch.nn.ModuleDict({"net": NanoGPT()})
    module["ema"] = AveragedModel(module["net"])
    assert [handle.name for handle in attach(module)] == ["net.h.0.attn", "net.h.1.attn"]
    found = handles(module)
    assert found["ema.module.h.1.attn"] is found["net.h.1.attn"]


def test_a_plain_copy_that_stays_dense_is_said_once(tmp_path, caplog):
    module = PlainCopy()
    trainer(tmp_path, [pruning()], steps=4).fit(module, batches(), batches(8))
    (record,) = [r for r in caplog.records if "No training step runs the 2 layers" in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert (
        "'ema.model.layers.0.self_attn', which have names like 'model.model.layers.0.self_attn'" in record.getMessage()
    )
    assert "AveragedModel" in record.getMessage()


def test_lightnings_weight_averaging_is_validated_with_the_patterns(tmp_path):
    """It swaps the averaged weights into the module, whose layers keep their patterns."""
    seen = []

    class Watched(TinyModule):
        def validation_step(self, batch, batch_idx):
            seen.append([handle.pattern is not None for handle in handles(self).values()])

    callback = pruning()
    fit = trainer(tmp_path, [callback, EMAWeightAveraging(decay=0.5)], steps=8, val_check_interval=4)
    fit.fit(Watched(), batches(), batches(4))
    assert seen
    assert all(all(part) for part in seen)


def test_which_layers_an_average_is_of():
    modules = {"ema": AveragedModel(torch.nn.Linear(1, 1)), "": torch.nn.Module()}
    inside = ["ema.module.0.attn", "ema.module.1.attn"]
    assert averaged_layers(modules, ["net.0.attn", "net.1.attn", *inside]) == {
        "ema.module.0.attn": "net.0.attn",
        "ema.module.1.attn": "net.1.attn",
    }
    assert averaged_layers(modules, ["net.0.attn", *inside]) == {}
    both = ["net.0.attn", "net.1.attn", "ref.0.attn", "ref.1.attn"]
    assert averaged_layers(modules, [*both, *inside]) == {}
    assert likely_copies(["a.b.0.attn", "a.b.1.attn"], ["c.0.attn", "c.1.attn", "d.attn"]) == {
        "a.b.0.attn": "c.0.attn",
        "a.b.1.attn": "c.1.attn",
    }
    assert likely_copies(["head.attn"], ["c.0.attn", "c.1.attn"]) == {}
