"""Held-out examples count once on any number of processes."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from sparse_prune.recipes.base.held_out import HeldOutLoader, HeldOutMean


def batches(examples, processes, batch_size):
    """Per process."""
    samplers = [DistributedSampler(examples, processes, rank, shuffle=False) for rank in range(processes)]
    return [list(HeldOutLoader(examples, batch_size=batch_size, sampler=sampler)) for sampler in samplers]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("count", "processes", "batch_size"), [(3, 2, 1), (7, 4, 2), (9, 4, 2), (1, 3, 4), (8, 2, 3)])
def test_every_example_counts_once_and_all_processes_get_as_many_batches(count, processes, batch_size, named):
    values = torch.arange(count)
    shares = batches([{"x": value} for value in values] if named else values, processes, batch_size)
    assert len({len(share) for share in shares}) == 1
    counted = []
    for batch in (batch for share in shares for batch in share):
        found = batch.examples["x"] if named else batch.examples
        assert len(found) == max(batch.counted, 1)
        counted += found[: batch.counted].tolist()
    assert sorted(counted) == values.tolist()


def test_one_process_leaves_nothing_out():
    values = torch.arange(5)
    found = list(HeldOutLoader(values, batch_size=2))
    assert [batch.examples.tolist() for batch in found] == [[0, 1], [2, 3], [4]]
    assert [batch.counted for batch in found] == [2, 2, 1]


def test_the_mean_is_that_of_all_examples():
    losses, mean = torch.tensor([1.0, 2.0, 6.0]), HeldOutMean()
    for batch in (batch for share in batches(losses, 2, 2) for batch in share):
        mean.update(batch.examples.mean(), batch.counted)
    assert mean.compute() == losses.mean()
    mean.update(torch.tensor(torch.nan), 1)
    assert mean.compute().isnan()


def test_many_losses_add_up_in_a_module_of_half_precision():
    mean = torch.nn.ModuleList([HeldOutMean()]).to(torch.bfloat16)[0]  # as under `precision="bf16-true"`
    for _ in range(2):
        for _ in range(300):
            mean.update(torch.tensor(1.001), 16)
        assert mean.compute() == pytest.approx(1.001, rel=1e-5)
        mean.reset()
