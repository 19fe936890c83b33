"""Index tables: they hold the pattern, are built without waiting for the device, and wrong ones are refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from sparse_prune import BlockPattern
from sparse_prune.kernels import block_sparse_attention
from support.cases import random_pattern

pytest.importorskip("triton")
from sparse_prune.kernels.triton import tables  # noqa: E402
from sparse_prune.kernels.triton.attend import probe  # noqa: E402
from sparse_prune.kernels.triton.tables import (  # noqa: E402
    MEMBER_BIT,
    build_tables,
    build_visits,
    count_tiles,
    heads_together,
    index_tables,
)

CPU = torch.device("cpu")


@given(st.integers(1, 90), st.sampled_from([(16, 16), (32, 16), (16, 32)]), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_tables_hold_the_pattern_both_ways(length, tile, causal, seed):
    pattern = random_pattern(4, length, length, 32, causal, 0.5, seed)
    mask, all_visits = pattern.token_mask(length, length), set()
    for together in (None, 1, 2):
        visits, members, turned = index_tables(pattern, tile, CPU, together), together or 1, together is not None
        all_visits.add(visits.index.numel())
        rebuilt = torch.zeros_like(mask)
        programs = visits.order.numel()
        visits.check(programs, -(-length // tile[0 if turned else 1]), CPU, members)
        counts = visits.start.diff()
        assert (counts[visits.order.long()].diff() <= 0).all()
        for program in range(programs):
            first_head, outer = divmod(program, programs * members // 4)
            start, stop = visits.start[program : program + 2].tolist()
            whole = visits.index[start : start + visits.full[program]]
            assert (whole.diff() > 0).all()
            for place, entry in enumerate(visits.index[start:stop].tolist()):
                member, inner = divmod(entry, 1 << MEMBER_BIT)
                head = first_head * members + member
                row, col = (inner, outer) if turned else (outer, inner)
                part = (head, slice(row * tile[0], (row + 1) * tile[0]), slice(col * tile[1], (col + 1) * tile[1]))
                assert not rebuilt[part].any()
                rebuilt[part] = True
                if place < visits.full[program]:
                    assert mask[part].all()
                    assert (col + 1) * tile[1] <= length
        assert torch.equal(rebuilt & mask, mask)
    assert len(all_visits) == 1


def test_building_never_waits_for_the_device():
    """On fake tensors every operation whose result the host would have to read raises."""
    with FakeTensorMode():
        keep, full = torch.empty(3, 6, 6, dtype=torch.bool), torch.empty(6, 6, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):
            keep.nonzero()  # so this check can fail
        visits, together = build_visits(keep, full, 20), build_visits(keep, full, 20, 3)
    assert [tuple(t.shape) for t in visits.tensors()] == [(19,), (18,), (21,), (18,)]
    assert [tuple(t.shape) for t in together.tensors()] == [(7,), (6,), (21,), (6,)]
    pattern = random_pattern(3, 90, 90, 32, True)
    total = int(count_tiles(pattern, (16, 16)).sum())
    for members in (None, 1, 3):
        with FakeTensorMode():
            keep = torch.empty(pattern.keep.shape, dtype=torch.bool)
            found = build_tables(pattern, (16, 16), keep, total, members)
        real = index_tables(pattern, (16, 16), CPU, members)
        assert [t.shape for t in found.tensors()] == [t.shape for t in real.tensors()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_moving_pattern_costs_a_gpu_step_no_wait():
    query = torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attend = partial(block_sparse_attention, backend="triton")
    attend(query, query, query, random_pattern(4, 256, 256, 64, True)).sum().backward()  # compiles
    pattern = random_pattern(4, 256, 256, 64, True, seed=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(query, query, query, pattern).sum().backward()
        probe(query, query, (64, 64), causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_group_shares_a_program_where_none_gets_longer_than_a_processors_share(monkeypatch):
    monkeypatch.setattr(tables, "processors", lambda device: 8)

    def members(keep, batch=1):
        pattern = BlockPattern(keep, (32, 32), False, 32 * keep.shape[1], 32 * keep.shape[2])
        return heads_together(pattern, (16, 16), 2, batch, CPU)

    everything = torch.ones(4, 4, 4, dtype=torch.bool)
    assert members(everything) == 2  # 16 programs of one length
    assert members(everything[:, :, :1]) == 1  # 4 programs
    assert members(everything[:, :, :1], batch=2) == 2
    sink = torch.eye(8, dtype=torch.bool).repeat(4, 1, 1)
    assert members(sink) == 2
    sink[:, :, 0] = True  # 15 blocks a head, 8 of them in its first column, where two programs visit each
    assert members(sink) == 1
    assert members(sink, batch=2) == 2


def test_a_tile_must_divide_the_block():
    with pytest.raises(ValueError, match="`tile` must divide.*48"):
        index_tables(random_pattern(2, 64, 64, 32, True), (48, 16), CPU)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index", lambda t: t + 100, "`index` must lie in 0..2"),
        ("index", lambda t: t - 1, "`index` must lie in"),
        ("index", lambda t: t.long(), "`index` must be contiguous int32"),
        ("start", lambda t: t[:-1], "`start` must have shape"),
        ("start", lambda t: t.flip(0), "`start` must ascend"),
        ("full", lambda t: t + 5, "`full` must lie"),
        ("order", lambda t: torch.zeros_like(t), "`order` must hold every program"),
        ("order", lambda t: t.to("meta"), "`order` must be on cpu"),
    ],
)
def test_wrong_tables_are_refused(name, change, message):
    visits = index_tables(random_pattern(2, 48, 48, 16, True, 0.9), (16, 16), CPU)
    visits.check(6, 3, CPU)
    with pytest.raises(ValueError, match=message):
        replace(visits, **{name: change(getattr(visits, name))}).check(6, 3, CPU)
