"""Speed is told by a clock that the tests turn."""

import copy
import pickle
import types

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from sparse_prune import clock as device_clock
from sparse_prune import swap_timer
from sparse_prune.callbacks import KernelSwap, step_clock
from sparse_prune.callbacks.step_clock import StepClock
from support.logs import read_csv
from support.tiny import TinyModule, batches, pruning, trainer

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    for module in (step_clock, device_clock):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Timed(TinyModule):
    """The n-th batch takes 1 + n seconds; a batch of validation takes long."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 1.0 + batch_idx
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000.0


def test_speed_is_what_the_steps_took(tmp_path, clock):
    logger = CSVLogger(tmp_path, name="", version="")
    changes = {"log_every_n_steps": 4, "accumulate_grad_batches": 2, "val_check_interval": 3}
    run = trainer(tmp_path, [pruning(), KernelSwap("gather")], logger=logger, **changes)
    run.fit(Timed(clock), batches(), batches(4))
    rows = [row for row in read_csv(tmp_path) if "time/step_seconds" in row]
    assert [row["step"] for row in rows] == [4, 8]  # 12 steps, the first one warms up
    # Two batches of two sequences of 64 tokens make a step.
    for row, of in zip(rows, (range(2, 10), range(10, 18)), strict=True):
        seconds = sum(1.0 + batch for batch in of)
        assert row["time/step_seconds"] == pytest.approx(seconds / 4)
        assert row["time/tokens_per_second"] == pytest.approx(8 * 128 / seconds)


def test_measurements_of_the_swap_are_no_part_of_a_step_and_swaps_are_marked(tmp_path, clock, monkeypatch):
    def measure(*args, **kwargs):
        clock.now += 100.0
        return {"dense": 2.0, "gather": 1.0}

    monkeypatch.setattr(swap_timer, "time_attention", measure)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, [pruning()], logger=logger)
    run.fit(Timed(clock), batches())
    assert clock.now > 300.0
    rows = read_csv(tmp_path)
    speed = {row["step"]: row["time/step_seconds"] for row in rows if "time/step_seconds" in row}
    assert speed == pytest.approx({step: 1.0 + step for step in range(1, 12)})
    swaps = [row for row in rows if "swap/sparse_layers" in row]
    assert swaps
    for row in swaps:
        assert row["time/step_seconds_at_swap"] == speed[row["step"]]
        assert row["time/tokens_per_second_at_swap"] == pytest.approx(128 / speed[row["step"]])
    assert [row["step"] for row in rows if "time/step_seconds_at_swap" in row] == [row["step"] for row in swaps]


def test_a_swap_within_an_interval_is_marked_with_the_speed_before(tmp_path, clock):
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, [pruning(), KernelSwap("gather")], logger=logger, log_every_n_steps=4)
    run.fit(Timed(clock), batches())
    marks = {row["step"]: row["time/step_seconds_at_swap"] for row in read_csv(tmp_path) if "swap/layer_01" in row}
    assert marks == {6: pytest.approx((2 + 3 + 4 + 5) / 4)}


def test_a_gpu_is_timed_by_its_own_clock_and_waited_for_once_an_interval(monkeypatch):
    gpu = types.SimpleNamespace(now=0.0, done=0.0, waits=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = gpu.now

        def query(self):
            return self.at <= gpu.done

        def synchronize(self):
            gpu.waits += self.at > gpu.done
            gpu.done = max(gpu.done, self.at)

        def elapsed_time(self, end):
            assert end.query()
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock, device, metrics = StepClock(), torch.device("cuda"), []
    for step in range(1, 6):
        clock.start(device)
        gpu.now += 2.0  # a step, and what of it was measured apart
        clock.stop(device, tokens=10, apart=0.5)
        gpu.now += 7.0  # not in a step
        gpu.done = 10.0  # it has finished the second step, while Python is further on
        metrics.append(clock.read(step, every=4))
        assert gpu.waits == step // 5
    assert metrics[:4] == [{}] * 4
    assert metrics[4] == pytest.approx({"time/step_seconds": 1.5, "time/tokens_per_second": 10 / 1.5})


def test_an_interval_of_no_time_goes_on(clock):
    steps = StepClock()
    for step in (1, 2):
        steps.start(CPU)
        steps.stop(CPU, 8)
        assert steps.read(step, 1) == {}
    steps.start(CPU)
    clock.now += 4.0
    steps.stop(CPU, 8)
    assert steps.read(3, 1) == {"time/step_seconds": 2.0, "time/tokens_per_second": 4.0}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda clock: pickle.loads(pickle.dumps(clock))])
def test_a_copy_has_seen_nothing(clock, again):
    steps = StepClock()
    for step in (1, 2):
        steps.start(CPU)
        clock.now += 1.0
        steps.stop(CPU, 8)
        steps.read(step, 1)
    assert steps.at_swap()
    assert again(steps).at_swap() == {}
