import copy
import pickle

import pytest
import torch
from pytorch_lightning.callbacks import Callback, LambdaCallback, ModelCheckpoint
from pytorch_lightning.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints, LinearSchedule, swap_timer
from sparse_prune.attention import detach, handle_of
from sparse_prune.callbacks import (
    AttentionPruning,
    KernelSwap,
    SparsityLogger,
    restore_patterns,
)
from support.tiny import LENGTH, TinyModule, batches, load_frames, pruning, tiny_llama, trainer


def patterns(callback):
    return {name: pattern.keep for name, pattern in callback.pruner.patterns.items()}


def assert_same_patterns(one, other):
    assert one.keys() == other.keys()
    assert one
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_one_callback_brings_the_others_and_swaps_every_layer(tmp_path):
    callback, module = pruning(), TinyModule()
    fit = trainer(tmp_path, [callback])
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    fit.fit(module, batches())
    assert not any(isinstance(found, KernelSwap | SparsityLogger) for found in fit.callbacks)
    assert callback.report.requested == 0.4
    assert not callback.pruner.open_layers
    events = callback.swap.events
    assert {event.layer for event in events} == set(callback.pruner.layers)
    for event in events:
        assert (event.backend == "dense") == (event.sparse_ms >= event.dense_ms)
        assert callback.pruner.layers[event.layer].reverted == (event.backend == "dense")
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before


def test_named_backend_swaps_and_reaches_the_requested_sparsity(tmp_path):
    callback = pruning()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(TinyModule(), batches())
    assert callback.pruner.total_sparsity == pytest.approx(0.4, abs=0.01)
    assert {state.layer.mode for state in callback.pruner.layers.values()} == {"sparse"}


def test_pruning_changes_what_the_model_computes(tmp_path):
    callback, module = pruning(final=0.6), TinyModule()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(module, batches())
    tokens = next(iter(batches()))
    with torch.no_grad():
        sparse = module.model(tokens).logits
        for state in callback.pruner.layers.values():
            state.layer.mode = "masked"
        masked = module.model(tokens).logits
        for state in callback.pruner.layers.values():
            state.layer.mode = "dense"
        dense = module.model(tokens).logits
    torch.testing.assert_close(sparse, masked, atol=1e-5, rtol=1e-4)
    assert (sparse - dense).abs().max() > 1e-3


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("stop", [3, 7, 10])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_on_either_side_of_a_swap_repeats_the_unbroken_run(tmp_path, stop, accumulate):
    def run(path, module, extra=(), ckpt=None):
        callback, swap = pruning(every_n_steps=2, patience=1), KernelSwap("gather")
        fit = trainer(
            path, [callback, swap, *extra], enable_checkpointing=bool(extra), accumulate_grad_batches=accumulate
        )
        fit.fit(module, batches(), ckpt_path=ckpt, weights_only=False)
        return callback, swap

    whole = TinyModule()
    expected, expected_swap = run(tmp_path / "whole", whole)
    assert expected_swap.events[0].step == 7
    first = TinyModule()
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=stop)
    run(tmp_path / "first", first, [saver, StopAfter(stop)])
    second = TinyModule()
    resumed, swap = run(tmp_path / "second", second, [ModelCheckpoint(tmp_path / "x")], tmp_path / "cut.ckpt")
    assert len(first.losses) == stop * accumulate
    assert first.losses + second.losses == whole.losses
    assert_same_patterns(patterns(resumed), patterns(expected))
    assert swap.events == expected_swap.events
    assert resumed.report == expected.report


def test_accumulation_decides_once_per_optimizer_step(tmp_path):
    callback, steps = pruning(), []
    update = callback.pruner.update
    callback.pruner.update = lambda step, reduce=None: steps.append(step) or update(step, reduce)
    trainer(tmp_path, [callback], steps=3, accumulate_grad_batches=4).fit(TinyModule(), batches())
    assert steps == [1, 2, 3]


def watch_counts(callback):
    """How many rows every layer's statistics hold at every decision, as they come."""
    counts, update = [], callback.pruner.update

    def watched(step, reduce=None):
        seen = [state.layer.statistics for state in callback.pruner.layers.values()]
        counts.extend(statistics.counts.tolist() for statistics in seen if statistics is not None)
        return update(step, reduce)

    callback.pruner.update = watched
    return counts


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    results = []
    for checkpointing in (False, True):
        callback, model = pruning(), tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        module, counts = TinyModule(model.train()), watch_counts(callback)
        trainer(tmp_path, [callback, KernelSwap("gather")]).fit(module, batches())
        results.append((patterns(callback), module.losses, counts))
    # Sums and counts that both double, as a second probe in the backward pass would make them, give the same scores.
    assert len(results[0][2]) == 7 * 2
    assert results[0][2] == results[1][2]
    assert_same_patterns(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_and_swap(tmp_path, precision):
    callback, module = pruning(), TinyModule()
    trainer(tmp_path, [callback, KernelSwap("gather")], precision=precision).fit(module, batches())
    assert all(state.layer.mode == "sparse" for state in callback.pruner.layers.values())
    assert torch.isfinite(torch.tensor(module.losses)).all()


@pytest.mark.slow
def test_compiled_model_gives_the_same_patterns(tmp_path):
    results = []
    for compiled in (False, True):
        callback, model = pruning(), tiny_llama()
        module = TinyModule(torch.compile(model, backend="aot_eager") if compiled else model)
        trainer(tmp_path, [callback, KernelSwap("gather")]).fit(module, batches())
        results.append(({n.replace("_orig_mod.", ""): p for n, p in patterns(callback).items()}, module.losses))
    assert_same_patterns(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


def test_sanity_check_validation_and_test_never_probe_or_prune(tmp_path):
    callback = pruning(every_n_steps=1)
    probed = []

    class Watch(Callback):
        def _look(self, *args):
            probed.extend(s.layer.probe_block_size for s in callback.pruner.layers.values())

        on_validation_batch_start = on_test_batch_start = _look

    module = TinyModule()
    fit = trainer(tmp_path, [callback, Watch()], steps=3, num_sanity_val_steps=2, val_check_interval=1)
    fit.validate(module, batches(4))
    assert callback.report is None
    fit.fit(module, batches(), batches(4))
    before = patterns(callback)
    fit.test(module, batches(4))
    assert_same_patterns(before, patterns(callback))
    assert set(probed) == {None}
    assert len(probed) > 8


def test_two_ranks_agree(tmp_path):
    """Two gloo processes see different data and end with bit-equal patterns on both."""
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).parents[1] / "scenarios" / "ddp_run.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same_patterns(ranks[0]["patterns"], ranks[1]["patterns"])
    assert ranks[0]["losses"] != ranks[1]["losses"]
    assert ranks[0]["modes"] == ranks[1]["modes"]
    assert set(ranks[0]["modes"]) <= {"sparse", "dense"}


def test_protected_layer_and_head_stay_dense(tmp_path):
    layer = "model.model.layers.0.self_attn"
    other = "model.model.layers.1.self_attn"
    constraints = Constraints(protected_layers=(layer,), protected_heads={other: (2,)})
    callback = pruning(constraints=constraints)
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(TinyModule(), batches())
    found = callback.pruner.patterns
    assert found[layer].sparsity == 0
    assert found[other].head_sparsity[2] == 0
    assert found[other].sparsity > 0.3


def test_lengths_that_change_every_step(tmp_path):
    lengths = [64, 40, 13, 64, 1, 33, 50, 64, 17, 64, 64, 64]
    data = DataLoader([torch.randint(0, 32, (n,)) for n in lengths], batch_size=1)
    callback, module = pruning(), TinyModule()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(module, data)
    finite = [loss for loss, length in zip(module.losses, lengths, strict=True) if length > 1]
    assert torch.isfinite(torch.tensor(finite)).all()
    assert all(p.q_len == LENGTH for p in callback.pruner.patterns.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"final": 1.0}, "sparsity"),
        ({"block_size": (48, 32)}, "block_size"),
        ({"statistic": "median"}, "statistic"),
        ({"criterion": "sum"}, "criterion"),
        ({"decay": 1.0}, "decay"),
        ({"patience": 0}, "patience"),
        ({"threshold": LinearSchedule(final=0.1, end_step=3)}, "threshold"),
    ],
)
def test_bad_arguments_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        pruning(**changes)


def test_unknown_layer_and_model_without_attention_are_refused_before_training(tmp_path):
    module = TinyModule()
    with pytest.raises(ValueError, match="layers.9.*model.model.layers.0.self_attn"):
        trainer(tmp_path, [pruning(constraints=Constraints(protected_layers=("layers.9",)))]).fit(module, batches())
    assert module.losses == []
    with pytest.raises(ValueError, match="no attention layers"):
        trainer(tmp_path, [pruning()]).fit(TinyModule(torch.nn.Linear(2, 2)), batches())


def test_nan_scores_stop_training_and_name_the_layer(tmp_path):
    module = TinyModule()
    with torch.no_grad():
        module.model.model.layers[1].self_attn.q_proj.weight[:] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn.*NaN"):
        trainer(tmp_path, [pruning()]).fit(module, batches())


def test_checkpoint_of_another_model_is_refused(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3)
    trainer(tmp_path, [pruning(), saver], steps=3, enable_checkpointing=True).fit(TinyModule(), batches())
    state = torch.load(tmp_path / "cut.ckpt", weights_only=False)["callbacks"]["AttentionPruning"]
    other = pruning()
    other.pruner.attach(TinyModule(tiny_llama(num_hidden_layers=3)))
    with pytest.raises(ValueError, match=r"another model.*layers\.2"):
        other.load_state_dict(state)
    assert other.pruner.patterns == {}


def test_threshold_schedule_prunes_what_scores_below_it(tmp_path):
    schedule = LinearSchedule(final=0.2, end_step=6)
    callback = AttentionPruning(
        threshold=schedule,
        statistic="mean",
        block_size=8,
        every_n_steps=1,
        constraints=Constraints(hysteresis=0.0, sink_blocks=0, share_diagonals=0.0),
    )
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=8).fit(TinyModule(), batches())
    assert callback.report.threshold == 0.2
    for state in callback.pruner.layers.values():
        scores, keep = state.scores.value(), state.layer.pattern.keep
        forced = torch.eye(8, dtype=torch.bool)
        possible = state.layer.pattern.possible
        assert torch.equal(keep, ((scores >= 0.2) | forced) & possible)
        assert 0 < state.layer.pattern.sparsity < 1


def test_row_mass_keeps_the_share_it_promises(tmp_path):
    constraints = Constraints(hysteresis=0.0, sink_blocks=0, share_diagonals=0.0)
    callback = AttentionPruning(
        threshold=LinearSchedule(final=0.3, end_step=4),
        criterion="row_mass",
        block_size=8,
        every_n_steps=1,
        constraints=constraints,
    )
    trainer(tmp_path, [callback, KernelSwap("gather")], steps=6).fit(TinyModule(), batches())
    for state in callback.pruner.layers.values():
        scores, keep = state.mass.value(), state.layer.pattern.keep
        assert ((scores * keep).sum(-1) / scores.sum(-1)).min() >= 0.7
        assert state.layer.pattern.sparsity > 0.05
    assert callback.report.mass_kept[state.layer.name] > 0.7


def _settled_layer(tmp_path):
    callback = pruning()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(TinyModule(), batches())
    return next(iter(callback.pruner.layers.values())).layer


def test_swap_takes_the_fastest_backend(tmp_path, monkeypatch):
    layer, times = _settled_layer(tmp_path), {"dense": 1.5, "triton": 1.0, "gather": 2.0}
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: dict(times))
    event = KernelSwap()._event(layer, 7)
    assert (event.backend, event.sparse_ms, event.dense_ms) == ("triton", 1.0, 1.5)
    assert event.measured_ms == times
    times["dense"] = 1.0
    assert KernelSwap()._event(layer, 7).backend == "dense"
    del times["triton"], times["gather"]
    event = KernelSwap()._event(layer, 7)
    assert (event.backend, event.sparse_ms) == ("dense", None)


@pytest.mark.parametrize(("times", "backend"), [({}, "dense"), ({"gather": 2.0}, "gather")])
def test_swap_decides_when_candidates_could_not_be_measured(tmp_path, monkeypatch, times, backend):
    layer = _settled_layer(tmp_path)
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: dict(times))
    event = KernelSwap()._event(layer, 7)
    assert (event.backend, event.dense_ms, event.sparse_ms) == (backend, None, times.get("gather"))


def test_swap_counts_what_the_host_takes_where_nothing_hides_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(swap_timer, "hides_host", lambda device: False)
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: asked.append(args[-1]) or {})
    trainer(tmp_path, [pruning(), KernelSwap()]).fit(TinyModule(), batches())
    forecast, *swaps = asked  # the forecast comes before the first backward pass shows it
    assert forecast
    assert swaps
    assert not any(swaps)


def watch_decisions(callback):
    """The steps at which the callback decides, as they come."""
    steps, update = [], callback.pruner.update
    callback.pruner.update = lambda step, reduce=None: steps.append(step) or update(step, reduce)
    return steps


def test_another_module_starts_anew(tmp_path):
    callback, swap, logger = pruning(), KernelSwap("gather"), SparsityLogger(every_n_decisions=2)
    runs, frames = [], []
    for name in ("first", "second"):
        module = TinyModule()
        trainer(tmp_path / name, [callback, swap, logger]).fit(module, batches())
        runs.append((module.losses, callback.report, list(swap.events)))
        frames.append(load_frames(tmp_path / name))
        assert callback.pruner.attached_to(module)
    assert runs[0] == runs[1]
    assert len(runs[1][2]) == 2
    assert frames[0].keys() == frames[1].keys()


def test_a_module_that_is_fitted_again_from_the_start_is_pruned_anew(tmp_path, caplog):
    callback, swap, module = pruning(), KernelSwap("gather"), TinyModule()
    steps = watch_decisions(callback)
    for _ in range(2):
        trainer(tmp_path, [callback, swap]).fit(module, batches())
    assert steps == [1, 2, 3, 4, 5, 6, 7] * 2
    assert [event.step for event in swap.events] == [7, 7]
    assert callback.report.step == 7
    assert {state.layer.mode for state in callback.pruner.layers.values()} == {"sparse"}
    assert "The fit starts at step 0, but pruning was at step 12. Pruning starts anew" in caplog.text


def test_a_fit_after_the_validation_of_a_checkpoint_starts_anew(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=3)
    trainer(tmp_path, [pruning(), saver], steps=3, enable_checkpointing=True).fit(TinyModule(), batches())
    callback = pruning()
    steps, fit, module = watch_decisions(callback), trainer(tmp_path, [callback], steps=2), TinyModule()
    fit.validate(module, batches(4), ckpt_path=tmp_path / "cut.ckpt", weights_only=False)
    assert callback.report.step == 3
    fit.fit(module, batches())
    assert steps == [1, 2]


def test_a_trainer_that_goes_on_continues_the_pruning(tmp_path, caplog):
    callback = pruning()
    steps, fit, module = watch_decisions(callback), trainer(tmp_path, [callback], steps=3), TinyModule()
    fit.fit(module, batches())
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(module, batches())
    assert steps == [1, 2, 3, 4, 5]
    assert "starts anew" not in caplog.text


def test_patterns_of_another_block_size_are_refused(tmp_path):
    module = TinyModule()
    trainer(tmp_path, [pruning()], steps=2).fit(module, batches())
    message = r"`block_size` must be \(8, 8\) as in the pattern .*layers.0.self_attn.*got \(16, 16\).*detach"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [pruning(block_size=16)], steps=2).fit(module, batches())
    same = pruning()
    trainer(tmp_path, [same], steps=2).fit(module, batches())
    assert same.pruner.total_sparsity > 0
    detach(module)
    other = pruning(block_size=16)
    trainer(tmp_path, [other], steps=2).fit(module, batches())
    assert {pattern.block_size for pattern in other.pruner.patterns.values()} == {(16, 16)}


def test_the_others_lose_no_more_when_the_swap_gives_a_layer_back():
    model, tokens = tiny_llama(num_hidden_layers=4), torch.randint(0, 32, (2, LENGTH))
    pruner, again = (
        AttentionPruner(ConstantSchedule(final=0.4), block_size=8, min_delta=1.0, patience=3) for _ in range(2)
    )
    pruner.attach(model)

    def decide(pruner, step):
        pruner.probe(True)
        model(input_ids=tokens)
        pruner.probe(False)
        return pruner.update(step)

    before = decide(pruner, 1).layer_sparsity
    given_back = list(before)[:2]
    for name in given_back:
        pruner.layers[name].settled_at = 1
        pruner.revert(name)
    after = decide(pruner, 2).layer_sparsity
    assert after == {name: 0.0 if name in given_back else before[name] for name in before}
    again.attach(model)
    again.load_state_dict(pruner.state_dict())
    assert [state.reverted for state in again.layers.values()] == [True, True, False, False]
    assert decide(again, 3).layer_sparsity == after


class Judged(TinyModule):
    """Holds a model that its training step does not run."""

    def __init__(self):
        super().__init__()
        self.judge = tiny_llama()


def test_layers_that_are_never_run_keep_nothing_open(tmp_path, caplog):
    callback = pruning()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(Judged(), batches())
    assert callback.report.step == 7
    assert not callback.pruner.open_layers
    assert "ran none of the layers" not in caplog.text


class Referring(TinyModule):
    """Holds a frozen reference, as preference tuning does."""

    def __init__(self):
        super().__init__()
        self.reference = tiny_llama().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.reference(input_ids=batch).logits
        return super().training_step(batch, batch_idx) + 0.0 * wanted.mean()


def test_one_module_alone_is_pruned(tmp_path):
    callback, module = pruning(module="model"), Referring()
    trainer(tmp_path, [callback, KernelSwap("gather")]).fit(module, batches())
    assert list(callback.pruner.patterns) == [f"model.model.layers.{i}.self_attn" for i in (0, 1)]
    assert callback.pruner.total_sparsity == pytest.approx(0.4, abs=0.01)
    assert not any(handle_of(part) for part in module.reference.modules())
    with pytest.raises(
        ValueError, match=r"`module` must name a module of Referring, got 'policy'.*'model', 'reference'"
    ):
        trainer(tmp_path, [pruning(module="policy")]).fit(Referring(), batches())


class Late(TinyModule):
    """Its model comes with `configure_model`."""

    lr = 1e-3

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def configure_model(self):
        if isinstance(self.model, torch.nn.Identity):
            self.model = tiny_llama()


class Wrapping(TinyModule):
    """Puts its model into another one in `setup`, as adapters are."""

    def setup(self, stage):
        if not isinstance(self.model, Wrapped):
            self.model = Wrapped(self.model or tiny_llama())


class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


@pytest.mark.parametrize("built", [True, False])
def test_layers_are_those_that_setup_made(tmp_path, built):
    module, again = Wrapping(), Wrapping()
    if not built:
        module.model = again.model = None
    first, second = pruning(), pruning()
    fit = trainer(tmp_path, [first, KernelSwap("gather")], steps=3)
    fit.fit(module, batches())
    assert list(first.pruner.patterns) == [f"model.inner.model.layers.{i}.self_attn" for i in (0, 1)]
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed = trainer(tmp_path, [second, KernelSwap("gather")], steps=4)
    resumed.fit(again, batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert second.report.step == 4


def test_learning_rate_is_found_before_there_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback, module = pruning(), Late()
    fit = trainer(tmp_path, [callback, KernelSwap("gather")])
    Tuner(fit).lr_find(module, batches(), num_training=3, update_attr=False)
    assert callback.report is None
    fit.fit(module, batches())
    assert callback.report.step == 7
    assert callback.pruner.total_sparsity == pytest.approx(0.4, abs=0.01)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(batches().dataset)


class ByHand(TinyModule):
    """Steps two optimizers a batch."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.model.model, self.model.lm_head)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.model(input_ids=batch, labels=batch, use_cache=False).loss)
            optimizer.step()


@pytest.mark.parametrize(("module", "data"), [(TinyModule, DataLoader(Stream(), batch_size=2)), (ByHand, batches())])
def test_training_of_unknown_length_draws_no_warning(tmp_path, caplog, module, data):
    fit = trainer(tmp_path, [pruning(end_step=32)], steps=-1, max_epochs=1)
    fit.fit(module(), data)
    assert fit.global_step >= 32
    assert "no layer will settle" not in caplog.text


@pytest.mark.parametrize("every", [1, 2, 3])
def test_several_optimizer_steps_a_batch_draw_no_warning(tmp_path, caplog, every):
    callback = pruning(every_n_steps=every, end_step=12)
    trainer(tmp_path, [callback], steps=20).fit(ByHand(), batches())
    assert not callback.pruner.open_layers
    assert "ran none of the layers" not in caplog.text


class Generate(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        module.eval()
        prompt = torch.ones(1, 8, dtype=torch.long)
        module.model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        module.train()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_generation_after_a_batch_is_not_probed(tmp_path, accumulate):
    results = []
    for others in ([], [Generate()]):
        callback, module = pruning(), TinyModule()
        fit = trainer(tmp_path, [*others, callback], steps=4, accumulate_grad_batches=accumulate)
        fit.fit(module, batches())
        results.append((patterns(callback), module.losses, callback.report.mass_kept))
    assert_same_patterns(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


class Skipping(TinyModule):
    """Leaves an epoch at the first batch of the second half, in which a decision is due, or skips that step."""

    kind = "returns -1"

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.kind == "returns -1" and batch_idx == 3 else None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.kind == "returns no loss" and batch_idx == 3 else loss


class RunsTheModel(Callback):
    """In every hook of a fit, as an evaluator or a generator of samples may do."""

    def _run(self, trainer, module, *args, **kwargs):
        with torch.no_grad():
            module.model(torch.zeros(8, LENGTH, dtype=torch.long), use_cache=False)

    on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = _run
    on_train_end = on_validation_start = on_validation_batch_start = on_validation_end = on_before_optimizer_step = _run


@pytest.mark.parametrize("kind", ["returns -1", "returns no loss", "ordinary"])
@pytest.mark.parametrize("front", [True, False])
def test_only_the_training_step_is_probed(tmp_path, kind, front):
    results = []
    for others in ([], [RunsTheModel()]):
        callback, module = pruning(swap=KernelSwap("gather")), Skipping()
        module.kind = kind
        callbacks = [*others, callback] if front else [callback, *others]
        fit = trainer(tmp_path, callbacks, steps=8, max_epochs=10)
        fit.fit(module, batches(12), batches(4))
        fit.test(module, batches(4), verbose=False)
        assert all(state.layer.statistics is None for state in callback.pruner.layers.values())
        results.append((patterns(callback), module.losses, callback.report.mass_kept))
    assert_same_patterns(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


NAMES = {"sparsity": 0.123, "threshold": 0.456, "prune/threshold": 0.789, "sparsity/total": 0.5}
"""Under which a module may log, for they come to mind first."""


class TellsInTheStep(TinyModule):
    def training_step(self, batch, batch_idx):
        self.log_dict(NAMES)
        return super().training_step(batch, batch_idx)


class TellsAfterIt(TinyModule):
    def on_train_batch_end(self, *args):
        self.log_dict(NAMES)


@pytest.mark.parametrize("kind", [TellsInTheStep, TellsAfterIt])
def test_names_of_the_progress_bar_are_our_own(tmp_path, kind):
    callback = pruning()
    fit = trainer(tmp_path, [callback], steps=3)
    fit.fit(kind(), batches())
    assert {key: float(fit.callback_metrics[key]) for key in NAMES} == pytest.approx(NAMES)
    shown = {"prune/sparsity_now": callback.pruner.total_sparsity, "prune/threshold_now": callback.report.threshold}
    assert {key: float(fit.progress_bar_metrics[key]) for key in shown} == pytest.approx(shown)


class Copies(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer_of, module.trainer = module.trainer, None
        self.copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        module.trainer = trainer_of


def test_a_copy_of_the_module_trains_itself(tmp_path):
    copies, module = Copies(), TinyModule()
    trainer(tmp_path, [pruning(), copies], steps=2).fit(module, batches())
    assert "training_step" not in vars(module)
    for found in copies.copies:
        assert found.training_step.__self__ is found


@pytest.mark.parametrize(("accumulate", "first"), [(1, 2), (2, 1)])
def test_without_a_block_size_the_first_training_call_chooses(tmp_path, caplog, accumulate, first):
    callback, seen = pruning(block_size=None, final=0.2), []
    count = LambdaCallback(on_train_batch_end=lambda *args: seen.append(callback.report and callback.report.step))
    fit = trainer(tmp_path, [callback, count], steps=4, accumulate_grad_batches=accumulate)
    with caplog.at_level("INFO", "sparse_prune"):
        fit.fit(TinyModule(), batches())
    assert callback.pruner.block_size == (16, 16)
    assert [step for step in seen if step][0] == first
    told = [text for text in caplog.messages if "chosen for sequences of 64 tokens" in text]
    assert told == ["Blocks of 16 x 16 tokens were chosen for sequences of 64 tokens (`block_size` sets others)."]
    assert not any("ran none of the layers" in text for text in caplog.messages)


def test_a_chosen_block_size_is_resumed_restored_and_chosen_anew_for_another_model(tmp_path):
    callback = pruning(block_size=None)
    module, path = TinyModule(), tmp_path / "a.ckpt"
    first = trainer(tmp_path, [callback], steps=4)
    first.fit(module, batches())
    first.save_checkpoint(path)
    again = pruning(block_size=None)
    trainer(tmp_path, [again], steps=5).fit(TinyModule(), batches(), ckpt_path=path, weights_only=False)
    assert again.pruner.block_size == (16, 16)
    restored = restore_patterns(TinyModule(), path, weights_only=False)
    assert {pattern.block_size for pattern in restored.values()} == {(16, 16)}
    longer = torch.randint(0, 32, (2, 1024), generator=torch.Generator().manual_seed(0))
    trainer(tmp_path, [callback], steps=2).fit(
        TinyModule(tiny_llama(max_position_embeddings=1024)), DataLoader(longer, batch_size=1)
    )
    assert callback.pruner.block_size == (32, 32)


def test_layers_without_a_call_choose_no_block_size(tmp_path, caplog):
    class Elsewhere(TinyModule):
        def training_step(self, batch, batch_idx):
            return self.model.model.embed_tokens(batch).sum()

    callback = pruning(block_size=None)
    trainer(tmp_path, [callback], steps=2).fit(Elsewhere(), batches())
    assert callback.pruner.block_size is None
    assert "Step 1 ran none of the layers" in caplog.text
