"""Runs that are killed and resumed again and again end as the unbroken run does."""

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from sparse_prune.callbacks import KernelSwap, newest_checkpoint
from support.tiny import TinyModule, batches, pruning, trainer


@pytest.mark.slow
def test_killed_and_resumed_runs_end_like_the_unbroken_one(tmp_path):
    command = [sys.executable, Path(__file__).with_name("kill_run.py"), tmp_path, "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] >= 30
    whole = torch.load(tmp_path / "whole" / "result")
    losses = dict(json.loads(line) for line in (tmp_path / "whole" / "losses").read_text().splitlines())
    assert list(losses) == list(range(12))
    assert len(whole["swaps"]) == 2
    deaths = Counter()
    for number in range(1, told["runs"] + 1):
        run = tmp_path / f"run{number}"
        deaths.update((run / "deaths").read_text().splitlines() if (run / "deaths").exists() else [])
        result = torch.load(run / "result")
        assert result["swaps"] == whole["swaps"]
        assert result["modes"] == whole["modes"] == ["sparse", "sparse"]
        for name, keep in whole["patterns"].items():
            assert torch.equal(result["patterns"][name], keep)
        repeated = [json.loads(line) for line in (run / "losses").read_text().splitlines()]
        assert {step for step, _ in repeated} == set(losses)
        for step, loss in repeated:
            assert loss == losses[step], (number, step)
    assert deaths.total() == told["killed"]
    wanted = {"before a swap", "during a swap", "after a swap", "while a checkpoint is written"}
    assert wanted | {"while a checkpoint is moved"} <= set(deaths), deaths


@pytest.fixture
def checkpoints(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=2, filename="{step}")
    fit = trainer(tmp_path, [pruning(), KernelSwap("gather"), saver], steps=4, enable_checkpointing=True)
    fit.fit(TinyModule(), batches())
    return tmp_path / "kept"


def test_the_newest_whole_checkpoint_is_found_and_broken_ones_are_named(checkpoints, caplog):
    assert newest_checkpoint(checkpoints.parent).name == "step=4.ckpt"
    newest = checkpoints / "step=4.ckpt"
    data = newest.read_bytes()
    middle = len(data) // 2
    for broken in (data[:middle], b"", data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
        newest.write_bytes(broken)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_checkpoint(checkpoints).name == "step=2.ckpt"
        assert f"{newest} was cut short or damaged" in caplog.text
    (checkpoints / "step=2.ckpt").unlink()
    assert newest_checkpoint(checkpoints) is None
    assert newest_checkpoint(checkpoints / "none") is None  # the first start of all


def test_a_foreign_pruning_state_changes_nothing(checkpoints, tmp_path):
    path = checkpoints / "step=4.ckpt"
    saved = torch.load(path, weights_only=False)
    (key,) = [key for key in saved["callbacks"] if "AttentionPruning" in key]
    layers = saved["callbacks"][key]["pruner"]["layers"]
    layers["elsewhere"] = layers.pop(next(iter(layers)))
    torch.save(saved, path)
    callback = pruning()
    with pytest.raises(ValueError, match="checkpoint is of another model: it lacks the layers"):
        trainer(tmp_path, [callback, KernelSwap("gather")]).fit(TinyModule(), batches(), ckpt_path=path)
    assert all(state.layer.pattern is None for state in callback.pruner.layers.values())
