"""A run says how long it will take, and is never silent for long."""

import logging
import time

import pytest
import pytorch_lightning as pl
import torch

from sparse_prune.recipes.base.progress import Heartbeat, Progress, spoken


class Slow(pl.LightningModule):
    """Takes its time for every step."""

    def __init__(self, seconds):
        super().__init__()
        self.weight, self.seconds = torch.nn.Parameter(torch.zeros(1)), seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return self.weight.sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback, seconds, tmp_path, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    options = {"accelerator": "cpu", "max_steps": 4, "default_root_dir": tmp_path} | options
    loader = torch.utils.data.DataLoader(torch.arange(16.0))
    pl.Trainer(**options, **quiet, callbacks=callback).fit(Slow(seconds), loader)


def test_the_first_step_is_told_with_the_time_to_come(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sparse_prune"):
        fit(Progress(twin=True), 0.1, tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
    assert line.startswith("The first step took 0.")
    assert line.endswith(" s, and the dense run after it as long again.")
    took, left = (float(part.split()[0]) for part in (line.partition("took ")[2], line.partition("about ")[2]))
    assert left == pytest.approx(3 * took, abs=0.3)


def test_accumulated_batches_are_one_step_and_later_lines_say_what_is_left(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sparse_prune"):
        fit(Progress(seconds=0.15), 0.05, tmp_path, accumulate_grad_batches=2)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("progress")]
    assert "3 more will take about" in lines[0]
    assert [line for line in lines if line.startswith("Step 3 of 4 is done; about 0.")]


class Pause(pl.Callback):
    """Does something long after the first step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            time.sleep(3.0)


def test_what_comes_once_after_the_first_step_is_no_part_of_the_time_left(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sparse_prune"):
        fit([Progress(seconds=0.01), Pause()], 0.1, tmp_path)
    lines = [line for line in caplog.messages if "done; about" in line]
    assert [float(line.partition("about ")[2].split()[0]) < 1.0 for line in lines] == [True, True, True]


def test_a_long_step_is_not_silent(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sparse_prune"):
        fit(Progress(seconds=0.2), 0.7, tmp_path, max_steps=1)
        count = len(caplog.records)
        time.sleep(0.5)  # the thread ends with the run
    assert len(caplog.records) == count
    assert [line for line in caplog.messages if line.startswith("Still at step 1, for 0.")]


def test_a_heartbeat_names_what_is_being_done(caplog):
    with caplog.at_level(logging.INFO, "sparse_prune"), Heartbeat("one thing", seconds=0.1) as heartbeat:
        heartbeat.at("another")
        time.sleep(0.3)
    assert caplog.messages
    assert all(line.startswith("Still at another, for 0.") for line in caplog.messages)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (95, "95 s"), (700, "12 min"), (12000, "3 h 20 min"), (7199, "2 h 0 min")]
)
def test_times_are_said_as_people_do(seconds, text):
    assert spoken(seconds) == text
