import json
import logging
import sys
import time

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from sparse_prune.callbacks import KernelSwap, SparsityLogger, sparsity_logger
from sparse_prune.callbacks.pattern_history import load_frames
from sparse_prune.callbacks.run_folder import run_folder
from sparse_prune.callbacks.sparsity_logger import HEAD_COLUMNS, head_table
from tiny import TinyModule, batches, pruning, tiny_llama, trainer

from sparse_prune import BlockPattern
from sparse_prune.export import load_patterns
from sparse_prune.pruner import attention_flops, kv_blocks_droppable

EXPECTED = {
    "prune/threshold",
    "prune/requested",
    "sparsity/total",
    "sparsity/layer_00",
    "sparsity/layer_01",
    "settle/change_layer_00",
    "settle/min_delta",
    "time/step_seconds",
    "time/tokens_per_second",
    "swap/layer_01",
    "swap/sparse_layers",
    "mass/kept",
    "savings/attention_flops",
    "savings/kv_bytes",
    "train/loss",
    "val/loss",
}


def fit(path, loggers, **changes):
    callback = pruning()
    run = trainer(path, [callback, KernelSwap("gather")], logger=loggers, **changes)
    run.fit(TinyModule(), batches(), batches(4))
    return callback


def read_csv(folder):
    import csv

    with open(folder / "metrics.csv") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


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


def read_leveldb_log(path, block=2**15):
    """Records of a LevelDB log, the format of a W&B offline file: blocks of checksum, length, type, data."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


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
    for key, wanted in sparsity_logger.SUMMARIES.items():
        summaries = {name for name in ("min", "max", "mean", "last") if getattr(metrics[key].summary, name)}
        assert summaries == set(wanted.split(","))
        assert metrics[key].step_metric == "trainer/global_step"
    # Every other key: W&B's client matches this one.
    assert metrics["*"].step_metric == "trainer/global_step"
    assert metrics["*"].options.step_sync


def test_speed_is_what_the_steps_took(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, logger, log_every_n_steps=4, accumulate_grad_batches=2)
    speeds = [row for row in read_csv(tmp_path) if "time/step_seconds" in row]
    assert len(speeds) == 2  # 12 steps, the first one warms up
    for row in speeds:
        # Two batches of two sequences of 64 tokens make a step.
        assert row["time/tokens_per_second"] == pytest.approx(256 / row["time/step_seconds"], rel=1e-6)


def test_swaps_are_marked_on_the_curves_of_the_speed(tmp_path):
    fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    rows = read_csv(tmp_path)
    swaps = {row["step"] for row in rows if "swap/sparse_layers" in row}
    assert swaps
    for key in ("time/step_seconds", "time/tokens_per_second"):
        speed = {row["step"]: row[key] for row in rows if key in row}
        marks = {row["step"]: row[f"{key}_at_swap"] for row in rows if f"{key}_at_swap" in row}
        assert marks == {step: speed[step] for step in swaps}


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


def test_one_decision_makes_two_frames(tmp_path):
    trainer(tmp_path, [pruning(every_n_steps=10)], steps=3).fit(TinyModule(), batches())
    assert list(load_frames(tmp_path)) == [1, 3]


def test_a_run_of_wandb_has_a_folder_of_its_own(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(project="test", id="abc", save_dir=tmp_path, offline=True)
    assert run_folder(trainer(tmp_path, [], logger=logger)) == tmp_path / "test" / "abc"
    behind = [CSVLogger(tmp_path, name="", version=""), logger]
    assert run_folder(trainer(tmp_path, [], logger=behind)) == tmp_path
    assert run_folder(trainer(tmp_path, [])) == tmp_path


def test_fast_dev_run_leaves_no_files(tmp_path):
    callback = pruning(final=0.4, end_step=1, patience=1)
    trainer(tmp_path, [callback, KernelSwap("gather")], fast_dev_run=3).fit(TinyModule(), batches())
    assert not callback.pruner.open_layers
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_last_swaps_are_logged_behind_a_given_swap(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, [pruning(), KernelSwap("gather")], steps=7, logger=logger)
    run.fit(TinyModule(), batches())
    assert [type(callback) for callback in run.callbacks[1:3]] == [KernelSwap, SparsityLogger]
    assert [row["step"] for row in read_csv(tmp_path) if "swap/sparse_layers" in row] == [6]


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
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparsity_logger, "save_frame", full)
    monkeypatch.setattr(sparsity_logger, "save_patterns", full)
    callback = fit(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert not callback.pruner.open_layers
    assert "No space left" in caplog.text


def test_pictures_need_a_whole_number_of_decisions():
    with pytest.raises(ValueError, match="`every_n_decisions` must be at least 1, got 0"):
        SparsityLogger(every_n_decisions=0)


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
    assert attention_flops(pattern, head_dim=16) == (28 * 4 * 64 * 16, 40 * 4 * 64 * 16)
    # A later query reaches the sink block and, one block on, only itself: three of four blocks can go.
    assert kv_blocks_droppable(pattern, num_kv_heads=2) == pytest.approx(0.75)


def test_importing_needs_no_wandb():
    import subprocess

    code = "import sys; sys.modules['wandb'] = None; import sparse_prune, sparse_prune.callbacks; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.dumps(done.stdout.strip()) == '"ok"', done.stderr
