import copy
import json
import logging
import pickle
import sys
import time

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sparse_prune import BlockPattern, swap_timer
from sparse_prune.callbacks import (
    AttentionPruning,
    KernelSwap,
    SparsityLogger,
    kernel_swap,
    logger_kinds,
    sparsity_logger,
)
from sparse_prune.export import load_patterns
from sparse_prune.export.history import FOLDER
from sparse_prune.metrics import HEAD_COLUMNS, head_table, savings
from support.logs import EXPECTED, read_csv, read_leveldb_log
from support.tiny import TinyModule, batches, load_frames, pruning, tiny_llama, trainer


def fit(path, loggers, **changes):
    callback = pruning()
    run = trainer(path, [callback, KernelSwap("gather")], logger=loggers, **changes)
    run.fit(TinyModule(), batches(), batches(4))
    return callback


def test_csv_holds_everything_at_the_right_steps(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = fit(tmp_path, logger, val_check_interval=4)
    rows = read_csv(tmp_path)
    assert set().union(*rows) >= EXPECTED
    losses = {row["step"] for row in rows if "train/loss" in row}
    sparsity = {row["step"]: row["sparsity/total"] for row in rows if "prune/requested" in row}
    # Steps of decisions are steps of losses: the axes are one.
    assert set(sparsity) <= losses
    requested = {row["step"]: row["prune/requested"] for row in rows if "prune/requested" in row}
    assert requested == {step: pytest.approx(callback.pruner.schedule(int(step) + 1)) for step in requested}
    assert max(sparsity.values()) == pytest.approx(callback.pruner.total_sparsity)


class Witness(pl.Callback):
    """Keeps what holds when a batch is done: CSV step -> value."""

    def __init__(self):
        self.reports, self.savings, self.patterns = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pruning, step = trainer.callbacks[0], trainer.global_step - 1
        if pruning.report.step == trainer.global_step:
            self.reports[step] = pruning.report
        self.savings[step] = savings(pruning.pruner)
        self.patterns[step] = pruning.pruner.patterns


def test_rows_hold_what_the_decision_of_their_step_reports(tmp_path):
    witness, callback = Witness(), pruning()
    callbacks = [callback, KernelSwap("gather"), SparsityLogger(), witness]
    trainer(tmp_path, callbacks, logger=CSVLogger(tmp_path, name="", version="")).fit(TinyModule(), batches())
    rows = {row["step"]: row for row in read_csv(tmp_path) if "prune/threshold" in row}
    assert rows.keys() == witness.reports.keys()
    assert len(rows) >= 6
    for step, report in witness.reports.items():
        wanted = {
            "prune/threshold": report.threshold,
            "prune/requested": report.requested,
            "settle/min_delta": 0.5,
            "sparsity/total": report.sparsity,
            "mass/kept": sum(report.mass_kept.values()) / 2,
            **witness.savings[step],
        }
        for number, name in enumerate(callback.pruner.layers):
            wanted[f"sparsity/layer_{number:02d}"] = report.layer_sparsity[name]
            wanted[f"mass/kept_layer_{number:02d}"] = report.mass_kept[name]
            if name in report.change:
                wanted[f"settle/change_layer_{number:02d}"] = report.change[name]
        found = {key: value for key, value in rows[step].items() if not key.startswith(("time/", "swap/", "train/"))}
        assert {key: found[key] for key in wanted} == pytest.approx(wanted)
        assert found.keys() - wanted.keys() <= {"epoch", "step", "dense/train_loss"}
    # The numbers are not all alike.
    last = rows[max(rows)]
    assert 0 < last["mass/kept"] < 1
    assert last["sparsity/layer_00"] != last["sparsity/layer_01"]
    assert len({row["savings/attention_flops"] for row in rows.values()}) > 3


def test_savings_are_those_of_the_patterns(tmp_path):
    callback = fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    kept = possible = cache = 0
    for pattern in callback.pruner.patterns.values():
        # Two products of 8 x 8 blocks and 8 channels, times two, for two sequences.
        kept += int(pattern.keep.sum()) * 2 * 2 * 8 * 8 * 8 * 2
        possible += 4 * 36 * 2 * 2 * 8 * 8 * 8 * 2
        cache += pattern.droppable_share(2) * 2 * 2 * 2 * 64 * 8 * 4
    wanted = {
        "savings/attention_flops": possible - kept,
        "savings/attention_flops_share": 1 - kept / possible,
        "savings/kv_bytes": cache,
        "savings/kv_share": cache / (2 * 2 * 2 * 2 * 64 * 8 * 4),
    }
    row = [row for row in read_csv(tmp_path) if "savings/attention_flops" in row][-1]
    assert {key: row[key] for key in wanted} == pytest.approx(wanted)
    assert 0.3 < row["savings/attention_flops_share"] < 0.5


def test_layers_that_are_given_back_are_logged_as_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(swap_timer, "time_attention", lambda *args: {"dense": 1.0, "gather": 2.0})
    monkeypatch.setattr(kernel_swap, "forecast_swap", lambda *args: [])
    trainer(tmp_path, [pruning()], logger=CSVLogger(tmp_path, name="", version="")).fit(TinyModule(), batches())
    last = {key: value for row in read_csv(tmp_path) for key, value in row.items()}
    assert last["swap/sparse_layers"] == 0
    assert last["settle/change_layer_00"] < 0.5
    for number in ("00", "01"):
        assert last[f"sparsity/layer_{number}"] == 0
        assert last[f"mass/kept_layer_{number}"] == pytest.approx(1)
    assert last["mass/kept"] == pytest.approx(1)
    for key in ("sparsity/total", "savings/attention_flops", "savings/attention_flops_share", "savings/kv_bytes"):
        assert last[key] == 0


def test_patterns_land_beside_the_logs(tmp_path):
    callback = fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    saved = load_patterns(tmp_path / "attention_pattern.safetensors")
    assert saved.keys() == callback.pruner.patterns.keys()
    for name, pattern in callback.pruner.patterns.items():
        assert torch.equal(saved[name].keep, pattern.keep)


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, logger)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= EXPECTED - {"val/loss"}
    assert set(events.Tags()["images"]) == {"patterns/layer_00", "patterns/layer_01", "patterns/atlas"}


def read_wandb_file(path, seconds=30.0):
    """The records of a finished run. W&B's client writes the last block a moment after `finish` returns."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + seconds
    while True:
        records = [wandb_internal_pb2.Record.FromString(data) for data in read_leveldb_log(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.1)


@pytest.mark.slow
def test_offline_wandb_run_holds_metrics_pictures_artifact_and_summary(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(tmp_path, logger, val_check_interval=4)
    logger.experiment.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    keys, summary, artifacts, metrics = set(), set(), [], {}
    for record in read_wandb_file(file):
        keys |= {item.key or "/".join(item.nested_key) for item in record.history.item}
        summary |= {item.key or "/".join(item.nested_key) for item in record.summary.update}
        for artifact in (record.request.log_artifact.artifact, record.artifact):
            if artifact.type == "attention-pattern":
                artifacts.append(set(artifact.aliases))
        if record.metric.name or record.metric.glob_name:
            metrics[record.metric.name or record.metric.glob_name] = record.metric
    assert keys >= EXPECTED | {"patterns/layer_00/filenames", "patterns/layer_01/filenames"}
    assert any(key.startswith("patterns/atlas/") for key in keys)
    assert any(key.startswith("patterns/heads/") for key in keys)
    assert "final/sparsity" in summary
    assert artifacts[-1] == {"latest", "final"}
    assert all(aliases == {"latest"} for aliases in artifacts[:-1])
    assert len(artifacts) >= 2
    for key, wanted in logger_kinds.SUMMARIES.items():
        summaries = {name for name in ("min", "max", "mean", "last") if getattr(metrics[key].summary, name)}
        assert summaries == set(wanted.split(","))
        assert metrics[key].step_metric == "trainer/global_step"
    # Every other key: W&B's client matches this one.
    assert metrics["*"].step_metric == "trainer/global_step"
    assert metrics["*"].options.step_sync


def test_the_table_has_a_row_per_head(tmp_path):
    callback = pruning()
    swap = KernelSwap("gather")
    trainer(tmp_path, [callback, swap]).fit(TinyModule(), batches())
    rows = [dict(zip(HEAD_COLUMNS, row, strict=True)) for row in head_table(callback.pruner, swap.events)]
    assert len(rows) == 2 * 4
    for row in rows:
        pattern = callback.pruner.patterns[row["layer"]]
        assert row["sparsity"] == pytest.approx(float(pattern.head_sparsity[row["head"]]))
        assert 0 < row["mass kept"] <= 1
        assert row["backend"] == "gather"
        assert row["settled at"] >= 6
    for state in callback.pruner.layers.values():
        shares = torch.tensor(state.head_mass_kept)
        assert shares.min() <= state.mass_kept <= shares.max()


def test_frames_of_the_history_hold_the_patterns_of_their_step(tmp_path):
    callback = pruning()
    logger = SparsityLogger(every_n_decisions=2)
    trainer(tmp_path, [callback, KernelSwap("gather"), logger]).fit(TinyModule(), batches())
    frames = load_frames(tmp_path)
    assert list(frames)[:3] == [1, 3, 5]
    assert frames[max(frames)].keys() == callback.pruner.patterns.keys()
    for name, pattern in callback.pruner.patterns.items():
        found = frames[max(frames)][name]
        assert torch.equal(found.keep, pattern.keep)
        assert (found.block_size, found.causal, found.q_len) == (pattern.block_size, pattern.causal, pattern.q_len)
        assert frames[1][name].sparsity < frames[5][name].sparsity
    path = tmp_path / "pattern_history" / "step_00000003.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="step_00000003.npz must be a frame"):
        load_frames(tmp_path)


def test_the_history_of_another_run_is_not_mixed_in(tmp_path):
    saver = ModelCheckpoint(tmp_path / "kept", filename="cut", every_n_train_steps=4)
    for final, steps in ((0.4, 12), (0.2, 5)):
        callbacks = [pruning(final=final), KernelSwap("gather"), SparsityLogger(every_n_decisions=2), saver]
        trainer(tmp_path, callbacks, steps=steps, enable_checkpointing=True).fit(TinyModule(), batches())
    frames = load_frames(tmp_path)
    assert list(frames) == [1, 3, 5]
    callbacks = [pruning(final=0.2), KernelSwap("gather"), SparsityLogger(every_n_decisions=2)]
    resumed = trainer(tmp_path, callbacks, steps=7)
    resumed.fit(TinyModule(), batches(), ckpt_path=tmp_path / "kept" / "cut.ckpt", weights_only=False)
    assert list(load_frames(tmp_path)) == [1, 3, 5, 7]


def test_a_run_that_goes_on_from_an_older_checkpoint_forgets_the_steps_after_it(tmp_path):
    def run(steps, **options):
        saver = ModelCheckpoint(tmp_path / "kept", filename="cut", every_n_train_steps=4, save_top_k=1)
        callbacks = [pruning(), KernelSwap("gather"), SparsityLogger(every_n_decisions=2), saver]
        trainer(tmp_path, callbacks, steps=steps, enable_checkpointing=True).fit(TinyModule(), batches(), **options)

    run(7)
    assert list(load_frames(tmp_path)) == [1, 3, 5, 7]
    run(6, ckpt_path=tmp_path / "kept" / "cut.ckpt", weights_only=False)
    assert list(load_frames(tmp_path)) == [1, 3, 5, 6]


class Fails(pl.Callback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("boom"), RuntimeError)])
def test_a_run_that_is_broken_off_leaves_its_patterns(tmp_path, error, seen):
    callback = pruning()
    run = trainer(tmp_path, [callback, KernelSwap("gather"), Fails(3, error)])
    with pytest.raises(seen):
        run.fit(TinyModule(), batches())
    frames, saved = load_frames(tmp_path), load_patterns(tmp_path / "attention_pattern.safetensors")
    assert list(frames) == [1, 3]
    assert callback.pruner.total_sparsity > 0.2
    for name, pattern in callback.pruner.patterns.items():
        assert torch.equal(saved[name].keep, pattern.keep)
        assert torch.equal(frames[3][name].keep, pattern.keep)


def test_what_fails_after_an_exception_does_not_hide_it(tmp_path, monkeypatch, caplog):
    def broken(*args, **options):
        raise TypeError("worse")

    monkeypatch.setattr(sparsity_logger, "save_patterns", broken)
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, [pruning(), Fails(3, RuntimeError("boom"))]).fit(TinyModule(), batches())
    assert "were not written" in caplog.text


def test_exceptions_before_the_first_decision_and_after_the_fit_write_nothing(tmp_path):
    callbacks = [pruning(), Fails(0, RuntimeError("boom"))]
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, callbacks).fit(TinyModule(), batches())
    assert list(tmp_path.iterdir()) == []
    callbacks[1].step = -1
    run, module = trainer(tmp_path, callbacks, steps=3), TinyModule()
    run.fit(module, batches())
    (tmp_path / "attention_pattern.safetensors").unlink()
    with pytest.raises(TypeError):
        run.validate(module, torch.utils.data.DataLoader([None]))
    assert not (tmp_path / "attention_pattern.safetensors").exists()


def test_one_decision_makes_two_frames(tmp_path):
    trainer(tmp_path, [pruning(every_n_steps=10)], steps=3).fit(TinyModule(), batches())
    assert list(load_frames(tmp_path)) == [1, 3]


def test_fast_dev_run_leaves_no_files(tmp_path):
    callback = pruning(final=0.4, end_step=1, patience=1)
    trainer(tmp_path, [callback, KernelSwap("gather")], fast_dev_run=3).fit(TinyModule(), batches())
    assert not callback.pruner.open_layers
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_last_swaps_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, [pruning(), KernelSwap("gather")], steps=7, logger=logger)
    run.fit(TinyModule(), batches())
    assert [row["step"] for row in read_csv(tmp_path) if "swap/sparse_layers" in row] == [6]


@pytest.mark.parametrize(
    "kinds",
    [
        (SparsityLogger, AttentionPruning),
        (SparsityLogger, AttentionPruning, KernelSwap),
        (AttentionPruning, SparsityLogger, KernelSwap),
        (SparsityLogger, KernelSwap, AttentionPruning),
    ],
)
def test_collaborators_of_the_list_are_adopted_wherever_they_stand_and_act_once(tmp_path, kinds):
    callbacks = {kind: pruning() if kind is AttentionPruning else kind() for kind in kinds}
    callbacks |= {KernelSwap: KernelSwap("gather")} if KernelSwap in kinds else {}
    logger = CSVLogger(tmp_path, name="", version="")
    fit = trainer(tmp_path, list(callbacks.values()), logger=logger)
    given = list(fit.callbacks)
    fit.fit(TinyModule(), batches())
    assert fit.callbacks == given
    callback = callbacks[AttentionPruning]
    assert callback.swap is callbacks.get(KernelSwap, callback.swap)
    assert callback.logging is callbacks[SparsityLogger]
    assert [event.layer for event in callback.swap.events] == list(callback.pruner.layers)
    decided = [row["step"] for row in read_csv(tmp_path) if "prune/requested" in row]
    assert len(decided) == len(set(decided)) == callback.report.step
    # A Trainer that holds none gets the callback's own.
    trainer(tmp_path, [callback], steps=1).fit(TinyModule(), batches())
    assert callback.swap is not callbacks.get(KernelSwap)
    assert callback.logging is not callbacks[SparsityLogger]


def test_collaborators_may_be_given_and_one_of_a_kind_is_enough(tmp_path):
    swap, logger = KernelSwap("gather"), SparsityLogger(images=False)
    callback = pruning(swap=swap, logging=logger)
    trainer(tmp_path, [swap, callback]).fit(TinyModule(), batches())
    assert (callback.swap, callback.logging) == (swap, logger)
    assert {event.backend for event in swap.events} == {"gather"}
    assert len(swap.events) == 2
    for extra in (KernelSwap(), SparsityLogger()):
        with pytest.raises(ValueError, match=rf"must hold one {type(extra).__name__}, got 2.*Leave the others out"):
            trainer(tmp_path, [callback, extra]).fit(TinyModule(), batches())
        with pytest.raises(ValueError, match=r"must hold an AttentionPruning beside .*, got none"):
            trainer(tmp_path, [extra]).fit(TinyModule(), batches())
    with pytest.raises(TypeError, match=r"`swap` must be a KernelSwap or None, got 'gather'. Write KernelSwap\(\)"):
        pruning(swap="gather")


def test_checkpoints_of_before_collaborators_are_read(tmp_path):
    """Their states lay beside that of AttentionPruning, under their own names."""
    callback = pruning(swap=KernelSwap("gather"))
    fit = trainer(tmp_path, [callback])
    fit.fit(TinyModule(), batches())
    fit.save_checkpoint(tmp_path / "new.ckpt")
    saved = torch.load(tmp_path / "new.ckpt", weights_only=False)
    state = saved["callbacks"]["AttentionPruning"]
    saved["callbacks"] |= {"KernelSwap": state.pop("swap"), "SparsityLogger": state.pop("logging")}
    torch.save(saved, tmp_path / "old.ckpt")
    for name in ("new", "old"):
        again = pruning(swap=KernelSwap("gather"))
        resumed = trainer(tmp_path, [again], steps=13)
        resumed.fit(TinyModule(), batches(), ckpt_path=tmp_path / f"{name}.ckpt", weights_only=False)
        assert again.swap.events == callback.swap.events
        assert again.logging.state()["decisions"] == 7


class Bringing(TinyModule):
    """Lightning puts what `configure_callbacks` returns at the end, at every fit anew."""

    def configure_callbacks(self):
        return [pruning(final=0.1)]


def test_callbacks_of_the_module_may_come_again(tmp_path):
    fit, module = trainer(tmp_path, [], steps=2), Bringing()
    for _ in range(2):
        fit.fit(module, batches())
    assert [type(callback) for callback in fit.callbacks] == [AttentionPruning]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda logger: pickle.loads(pickle.dumps(logger))])
def test_a_used_logger_can_be_copied(tmp_path, again):
    logger = SparsityLogger(every_n_decisions=2)
    logger._uploads.submit("anyone", lambda: None)
    logger._uploads.wait(10)
    trainer(tmp_path, [pruning(), KernelSwap("gather"), logger], steps=3).fit(TinyModule(), batches())
    other = again(logger)
    assert other.state().keys() == logger.state().keys()
    assert other.state()["decisions"] == 3
    trainer(tmp_path / "other", [pruning(), KernelSwap("gather"), other], steps=3).fit(TinyModule(), batches())
    assert list(load_frames(tmp_path / "other")) == [1, 3]
    done = []
    other._uploads.submit("anyone", lambda: done.append(1))
    other._uploads.wait(10)
    assert done == [1]


class Pair(TinyModule):
    """Trains two models, or the first of them alone."""

    def __init__(self):
        super().__init__()
        self.other, self.alone = tiny_llama(), False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.alone else loss + self.other(input_ids=batch, labels=batch, use_cache=False).loss


def test_layers_with_an_old_pattern_that_are_not_seen_stop_nothing(tmp_path):
    module, callback = Pair(), pruning()
    for module.alone in (False, True):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        trainer(tmp_path, [callback], steps=2, logger=logger).fit(module, batches())
    assert callback.report.step == 2
    kept = callback.report.mass_kept
    assert [share == 1.0 for share in kept.values()] == [name.startswith("other") for name in kept]


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparsity_logger, "save_frame", full)
    monkeypatch.setattr(sparsity_logger, "save_patterns", full)
    callback = fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert not callback.pruner.open_layers
    assert "No space left" in caplog.text


def test_pictures_need_a_whole_number_of_decisions():
    with pytest.raises(ValueError, match="`every_n_decisions` must be at least 1, got 0"):
        SparsityLogger(every_n_decisions=0)


def test_history_goes_with_the_metrics_and_the_artifact_to_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    uploaded = []
    monkeypatch.setattr(logger_kinds, "version_of", lambda logger, path, *args: lambda: uploaded.append(path))
    wandb_logger = WandbLogger(project="test", id="abc", save_dir=tmp_path, offline=True)
    fit(tmp_path, [wandb_logger, CSVLogger(tmp_path, name="csv", version="")])
    wandb_logger.experiment.finish()
    assert load_frames(tmp_path / "csv")
    assert set(uploaded) == {tmp_path / "csv" / "attention_pattern.safetensors"}
    assert [path.parent for path in tmp_path.rglob(FOLDER)] == [tmp_path / "csv"]


class Broken(Logger):
    name = version = "broken"
    calls = 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if "prune/threshold" in metrics:
            self.calls += 1
            raise ConnectionError("server is down")


def test_failing_logger_is_reported_once_and_stops_nothing(tmp_path, caplog):
    broken, good = Broken(), CSVLogger(tmp_path, name="", version="")
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, [broken, good])
    assert broken.calls == 1
    assert caplog.text.count("server is down") == 1
    assert set().union(*read_csv(tmp_path)) >= EXPECTED - {"val/loss"}


def test_a_logger_that_failed_in_one_fit_is_used_in_the_next(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    uploaded, callback = [], pruning(swap=KernelSwap("gather"))
    broken = Broken()

    def fail():
        raise ConnectionError("no way")

    for number, upload in enumerate((fail, lambda: uploaded.append(1))):
        monkeypatch.setattr(logger_kinds, "version_of", lambda *args, upload=upload: upload)
        logger = WandbLogger(project="test", id=f"run{number}", save_dir=tmp_path, offline=True)
        trainer(tmp_path, [callback], logger=[logger, broken]).fit(TinyModule(), batches())
        logger.experiment.finish()
        assert broken.calls == number + 1
    assert uploaded


class WithHyperparameters(TinyModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()


def test_pruning_settings_are_hyperparameters_beside_the_modules_own(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    csv, tensorboard = CSVLogger(tmp_path / "csv", "", ""), TensorBoardLogger(tmp_path / "tb", "", "")
    callback = pruning(swap=KernelSwap("gather"), final=0.3)
    trainer(tmp_path, [callback], steps=2, logger=[csv, tensorboard]).fit(WithHyperparameters(), batches())
    wanted = {
        "lr": 0.1,
        "pruning/sparsity": "CubicSchedule",
        "pruning/sparsity/final": 0.3,
        "pruning/sparsity/end_step": 6,
        "pruning/block_size": "(8, 8)",
        "pruning/every_n_steps": 1,
        "pruning/constraints/hysteresis": 0.2,
        "pruning/min_delta": 0.5,
        "pruning/swap": "gather",
    }
    for folder in ("csv", "tb"):
        found = yaml.safe_load((tmp_path / folder / "hparams.yaml").read_text())
        assert {key: found[key] for key in wanted} == wanted
    tensorboard.experiment.flush()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["pruning/sparsity/final"].number_value == 0.3
    assert shown["lr"].number_value == 0.1


def test_a_logger_that_takes_no_settings_gets_all_the_rest(tmp_path, caplog):
    class Strict(CSVLogger):
        def log_hyperparams(self, params):
            raise RuntimeError("changing a parameter is not allowed")

    fit(tmp_path, Strict(tmp_path, name="", version=""))
    assert caplog.text.count("Strict takes no pruning settings") == 1
    assert set().union(*read_csv(tmp_path)) >= EXPECTED - {"val/loss"}


def test_missing_pillow_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "PIL", None)
    callback = fit(tmp_path, TensorBoardLogger(tmp_path, name="", version=""))
    assert not callback.pruner.open_layers
    assert caplog.text.count("TensorBoardLogger failed and gets no more sparsity logs") == 1


def test_no_logger_is_fine(tmp_path):
    assert fit(tmp_path, False).report is not None


def test_savings_follow_from_the_pattern():
    keep = torch.zeros(4, 4, 4, dtype=torch.bool)
    keep[:, range(4), range(4)] = True
    keep[:, :, 0] = True
    pattern = BlockPattern(keep, (8, 8), True, 32, 32)
    # Seven of ten possible blocks are kept in each of four heads; a product of 8 x 8 x 16 twice, times two.
    assert pattern.flops(head_dim=16) == (28 * 4 * 64 * 16, 40 * 4 * 64 * 16)
    # A later query reaches the sink block and, one block on, only itself: three of four blocks can go.
    assert pattern.droppable_share(num_kv_heads=2) == pytest.approx(0.75)


def test_importing_needs_no_wandb():
    import subprocess

    code = "import sys; sys.modules['wandb'] = None; import sparse_prune, sparse_prune.callbacks; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.dumps(done.stdout.strip()) == '"ok"', done.stderr
