"""The numbers that decide what dropout drops."""

import pytest
import torch

from sparse_prune.kernels import dropout
from sparse_prune.kernels.dropout import dropout_uniform


def positions(*shape):
    return torch.randint(0, 2**20, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_known_answer_of_philox():
    """Counter and key of zeros, from the test vectors of Random123."""
    zero = torch.zeros((), dtype=torch.int64)
    assert dropout_uniform(0, zero, zero, zero).item() == (0x6627E8D5 >> 8) / 2**24


@pytest.mark.parametrize(
    ("head", "query", "key"),
    [
        ((5, 1, 1), (5, 3, 1), (5, 1, 7)),
        ((5, 1, 1), (3, 1), (7,)),
        ((2, 4, 1, 1), (3, 1), (1, 7)),
        ((1,), (1,), (40,)),
        ((0, 1), (0, 1), (0, 7)),
    ],
)
@pytest.mark.parametrize("at_once", [1, 16, 50])
def test_pieces_and_the_whole_are_one(monkeypatch, head, query, key, at_once):
    parts = [positions(*shape) for shape in (head, query, key)]
    whole = dropout_uniform(7 << 40, *parts)
    monkeypatch.setattr(dropout, "_AT_ONCE", at_once)
    pieces = dropout_uniform(7 << 40, *parts)
    assert torch.equal(pieces, whole)
    assert pieces.shape == torch.broadcast_shapes(head, query, key)
    full = [part.expand(whole.shape) for part in parts]
    assert torch.equal(dropout_uniform(7 << 40, *full), whole)


def test_the_numbers_do_not_hang_on_the_default_type():
    head, query, key = (torch.arange(size).view(shape) for size, shape in ((9, (9, 1, 1)), (64, (64, 1)), (64, (64,))))
    wanted = dropout_uniform(5, head, query, key)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as in a training step under `precision="bf16-true"`
    try:
        assert torch.equal(dropout_uniform(5, head, query, key), wanted)
    finally:
        torch.set_default_dtype(default)


def test_what_is_worked_on_at_once_stays_small(monkeypatch):
    sizes, philox = [], dropout._philox

    def watched(*args):
        found = philox(*args)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(dropout, "_philox", watched)
    dropout_uniform(1, positions(300, 1, 1), positions(300, 32, 1), positions(300, 1, 64))
    assert max(sizes) <= dropout._AT_ONCE
    assert sum(sizes) == 300 * 32 * 64


def test_the_numbers_are_uniform_and_hang_on_everything():
    head, query, key = torch.arange(8)[:, None, None], torch.arange(64)[:, None], torch.arange(64)
    found = dropout_uniform(3, head, query, key)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    assert found.mean() == pytest.approx(0.5, abs=0.01)
    assert found.unique().numel() > 0.99 * found.numel()
    assert not torch.equal(found, dropout_uniform(4, head, query, key))
