"""Processes over gloo add up their statistics."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparse_prune import BlockStatistics
from sparse_prune.distributed import sum_over_ranks

RANKS = 3
KINDS = ("max", "mean")


def statistics(rank):
    """Layers that all ranks ran, at other lengths, that some did, and that none did but the last."""
    generator = torch.Generator().manual_seed(rank)
    shapes = {"all": (4 + rank, 5), "some": (3, 3), "last": (2, 7)}
    if rank == 1:
        shapes = {"all": shapes["all"]}
    elif rank == 0:
        del shapes["last"]
    found = {
        name: BlockStatistics(
            torch.rand(2, 3, rows, cols, generator=generator, dtype=torch.float64),
            torch.randint(0, 999, (2, 1, rows, 1), generator=generator).double(),
            KINDS,
        )
        for name, (rows, cols) in shapes.items()
    }
    if rank == 2:  # it saw packed sequences, under a mask of every head
        found["all"].counts = found["all"].counts * torch.randint(0, 9, (2, 3, 6, 5), generator=generator)
    return found


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=RANKS)
    found = [sum_over_ranks(statistics(rank)), sum_over_ranks({} if rank == 1 else statistics(rank))]
    bad = statistics(rank)
    if rank == 2:
        bad["all"].sums[1, 0, 3, 2] = torch.nan
    found.append(sum_over_ranks(bad))
    found.append(sum_over_ranks({}))
    torch.save([{name: vars(seen) for name, seen in part.items()} for part in found], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(one_rank, (folder,), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_sum(found, parts):
    expected = {}
    for part in parts:
        for name, seen in part.items():
            expected[name] = expected[name] + seen if name in expected else seen
    assert list(found) == list(expected)
    for name, seen in expected.items():
        assert found[name]["kinds"] == KINDS
        assert found[name]["sums"].dtype == torch.float64
        torch.testing.assert_close(found[name]["sums"], seen.sums, rtol=1e-6, atol=0)
        assert torch.equal(found[name]["counts"], seen.counts)


def test_sums_are_those_of_one_process_whatever_a_rank_ran(found):
    every = [statistics(rank) for rank in range(RANKS)]
    assert_sum(found[0][0], every)
    assert_sum(found[0][1], [every[0], {}, every[2]])
    assert found[0][3] == {}


def test_all_ranks_get_the_same_bits(found):
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert list(mine) == list(theirs)
            for name, seen in mine.items():
                for key in ("sums", "counts"):
                    assert seen[key].numpy().tobytes() == theirs[name][key].numpy().tobytes()


def test_nan_of_one_rank_reaches_all(found):
    for rank in found:
        assert rank[2]["all"]["sums"][1, 0, 3, 2].isnan()
        assert rank[2]["all"]["sums"].isnan().sum() == 1


def test_a_number_is_sent_twice_as_float32_and_nothing_large_is_pickled(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def gather(found, mine):
        found[:] = [mine, mine]
        assert "tensor" not in repr(mine)

    def exchange(received, part):
        sent.append(part.nbytes // 2)  # the other half stays here
        received.copy_(part)

    def spread(received, part):
        sent.append(part.nbytes)
        for other in received:
            other.copy_(part)

    for name, stand_in in {
        "all_gather_object": gather,
        "all_to_all_single": exchange,
        "all_gather": spread,
    }.items():
        monkeypatch.setattr(dist, name, stand_in)
    seen = BlockStatistics(torch.ones(2, 4, 8, 8).double(), torch.ones(2, 1, 8, 1).double(), KINDS)
    sum_over_ranks({"a": seen, "b": seen})
    assert sum(sent) == 2 * 4 * (2 * 4 * 8 * 8 + 2 * 8)
