"""Scores of the backward pass see the gradient of the loss once, whatever runs around them."""

import gc

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints, Influence, MassGradient, Max
from sparse_prune.callbacks import KernelSwap
from support.tiny import BLOCK, LENGTH, TinyModule, batches, pruning, tiny_llama, trainer


def run(path, *, score=None, steps=1, batch_size=4, module=None, **changes):
    """Layer -> average of the score after the first decision."""
    callback = pruning(score=score or Influence())
    module = module or TinyModule(tiny_llama().train())
    trainer(path, [callback], steps=steps, **changes).fit(module, batches(batch_size=batch_size))
    return callback, {name: state.scores.value() for name, state in callback.pruner.layers.items()}


def assert_close(left, right, rel):
    """Signed numbers of very different size: compared by the size of the largest."""
    assert left.keys() == right.keys()
    for name in left:
        known = left[name].isfinite()
        assert torch.equal(known, right[name].isfinite())
        assert known.any()
        bound = rel * float(left[name][known].abs().max())
        assert bound > 0
        assert float((left[name] - right[name])[known].abs().max()) < bound


def test_micro_batches_give_the_influence_of_the_whole_batch(tmp_path):
    _, whole = run(tmp_path / "a", batch_size=4)
    _, parts = run(tmp_path / "b", batch_size=1, accumulate_grad_batches=4)
    assert_close(whole, parts, 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("score", [Influence(), MassGradient()])
def test_checkpointing_shows_the_gradient_once(tmp_path, reentrant, score):
    _, plain = run(tmp_path / "a", score=score)
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen, probed = [], type(score).probe
    counting = type("Counting", (type(score),), {"probe": lambda self, call: seen.append(1) or probed(self, call)})
    _, again = run(tmp_path / "b", score=counting(), module=TinyModule(model))
    assert len(seen) == 2  # once a layer
    assert_close(plain, again, 1e-4)


def test_checkpointing_keeps_the_inputs_of_no_layer():
    """A hook on the output would hold them all until the backward pass."""
    model = tiny_llama(num_hidden_layers=3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    pruner = watched(model)

    def inputs():
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (2, 4, LENGTH, 8)}

    before = inputs()  # an earlier test may have left some
    loss = forward(model)
    assert inputs() <= before
    loss.backward()
    assert pruner.update(1).sparsity > 0


def test_a_gradient_scaler_leaves_no_trace(tmp_path):
    def mixed(scale):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        return run(tmp_path / str(scale), plugins=[plugin])[1]

    assert_close(mixed(64.0), mixed(4096.0), 1e-2)
    assert_close(run(tmp_path / "full")[1], mixed(1024.0), 5e-2)


def test_a_compiled_model_shows_the_same(tmp_path):
    _, plain = run(tmp_path / "a")
    torch._dynamo.reset()
    model = tiny_llama().train()
    model.compile(backend="eager")
    _, compiled = run(tmp_path / "b", module=TinyModule(model))
    torch._dynamo.reset()
    assert_close(plain, compiled, 1e-4)


def test_a_run_by_influence_settles_swaps_and_resumes_the_same(tmp_path):
    def fit(path, steps, saver=None, resume=None):
        callback = pruning(score=Influence(), end_step=4)
        module = TinyModule(tiny_llama().train())
        saved = {"enable_checkpointing": True} if saver else {}
        run = trainer(path, [callback, KernelSwap("gather"), *([saver] if saver else [])], steps=steps, **saved)
        run.fit(module, batches(), ckpt_path=resume)
        return callback.pruner

    whole = fit(tmp_path / "whole", 10)
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3)
    fit(tmp_path / "first", 3, saver)
    resumed = fit(tmp_path / "second", 10, resume=tmp_path / "cut.ckpt")
    assert whole.total_sparsity == pytest.approx(0.4, abs=0.02)
    assert all(state.layer.mode == "sparse" for state in whole.layers.values())
    assert all(torch.equal(whole.patterns[name].keep, p.keep) for name, p in resumed.patterns.items())


def watched(model, **changes):
    pruner = AttentionPruner(
        ConstantSchedule(final=0.4), block_size=BLOCK, **{"score": Influence(), "constraints": Constraints(), **changes}
    )
    pruner.attach(model)
    pruner.probe(True)
    return pruner


def forward(model):
    tokens = torch.randint(0, 32, (2, LENGTH))
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def test_a_probe_without_a_backward_pass_is_told_so():
    pruner = watched(model := tiny_llama())
    forward(model)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn'.*Influence\(\) needs the gradient.*\(2 of 2"):
        pruner.update(1)


def test_a_layer_that_no_gradient_reaches_is_named_or_protected():
    def freeze_below(model):
        for part in (model.model.embed_tokens, model.model.layers[0]):
            part.requires_grad_(False)
        return model

    pruner = watched(model := freeze_below(tiny_llama(tie_word_embeddings=False)))
    forward(model).backward()
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn'.*\(1 of 2 layers\).*protected_layers"):
        pruner.update(1)
    model = freeze_below(tiny_llama(tie_word_embeddings=False))
    pruner = watched(model, constraints=Constraints(protected_layers=("model.layers.0.self_attn",)))
    forward(model).backward()
    report = pruner.update(1)
    assert report.layer_sparsity["model.layers.0.self_attn"] == 0
    assert report.layer_sparsity["model.layers.1.self_attn"] > 0.5


def test_a_gradient_that_is_not_finite_is_refused():
    pruner = watched(model := tiny_llama())
    (forward(model) * torch.inf).backward()
    with pytest.raises(ValueError, match="sums of the score Influence must be finite"):
        pruner.update(1)


def test_a_checkpoint_of_another_score_is_refused():
    pruner = watched(model := tiny_llama())
    forward(model).backward()
    pruner.update(1)
    other = AttentionPruner(ConstantSchedule(final=0.4), block_size=BLOCK, score=Max())
    other.attach(tiny_llama())
    with pytest.raises(ValueError, match=r"`score` must be Influence as in the checkpoint.*got Max\(\)"):
        other.load_state_dict(pruner.state_dict())


def test_sums_since_the_last_decision_are_kept_in_checkpoints():
    pruner = watched(model := tiny_llama())
    forward(model).backward()
    again = watched(tiny_llama())
    again.load_state_dict(pruner.state_dict())
    expected, found = pruner.update(1), again.update(1)
    assert found == expected
    assert all(torch.equal(pruner.patterns[name].keep, p.keep) for name, p in again.patterns.items())


def test_state_of_before_reads_as_the_score_of_its_names():
    """It held the average of a statistic beside that of the mean, which the row-mass criterion reads."""
    old = watched(model := tiny_llama(), score=None, statistic="max")
    forward(model)
    old.update(1)
    state = {key: part for key, part in old.state_dict().items() if key != "score"}
    for part in state["layers"].values():
        part.pop("score_sums")
    again = watched(tiny_llama(), score=None, criterion="row_mass")
    again.load_state_dict(state)
    for name, layer in again.layers.items():
        assert torch.equal(layer.scores.value(), old.layers[name].mass.value())
