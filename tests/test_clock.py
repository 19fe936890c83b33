"""The clock counts what a device does, not what its host does before."""

import contextlib

import pytest
import torch

from sparse_prune import clock


class Machine:
    """A host and a device with clocks of their own, in seconds; the device works off a queue."""

    def __init__(self, monkeypatch, launch, work):
        self.launch, self.work, self.runs = launch, work, 0
        self.host = self.device = 0.0
        machine = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = machine.device = max(machine.host, machine.device)

            def synchronize(self):
                machine.synchronize()

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.synchronize())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(cycles / 1.8e9), raising=False)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def queue(self, seconds):
        self.device = max(self.host, self.device) + seconds

    def run(self):
        self.runs += 1
        self.host += self.launch
        self.queue(self.work)


@pytest.mark.parametrize(("launch", "work"), [(1e-3, 2e-4), (1e-4, 5e-2), (1e-3, 1e-3)])
def test_a_gpu_is_timed_without_its_host(monkeypatch, launch, work):
    machine = Machine(monkeypatch, launch, work)
    assert clock.milliseconds(machine.run, torch.device("cuda", 0)) == pytest.approx(1e3 * work)
    assert machine.runs == 6


@pytest.mark.parametrize(("launch", "work", "felt"), [(1e-3, 2e-4, 1e-3), (1e-4, 5e-2, 5e-2)])
def test_a_gpu_that_does_not_hide_its_host_is_timed_by_the_wall(monkeypatch, launch, work, felt):
    machine = Machine(monkeypatch, launch, work)
    assert clock.milliseconds(machine.run, torch.device("cuda", 0), hidden=False) == pytest.approx(1e3 * felt, rel=0.05)


@pytest.mark.parametrize("done", [True, False])
def test_a_device_hides_its_host_while_it_has_work_left(monkeypatch, done):
    stream = type("Stream", (), {"query": lambda self: done})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    assert clock.hides_host(torch.device("cuda", 0)) == (not done)
    assert clock.hides_host(torch.device("cpu"))


def test_a_cpu_is_timed_by_the_wall(monkeypatch):
    machine = Machine(monkeypatch, 3e-3, 0.0)
    assert clock.milliseconds(machine.run, torch.device("cpu")) == pytest.approx(3.0)
    assert machine.runs == 1
