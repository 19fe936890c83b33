"""FlexAttention as a second opinion on the reference, and as a backend."""

import gc
import typing
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

from sparse_prune.kernels import AttentionOptions, block_sparse_attention, flex
from support.cases import inputs, random_pattern

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def compare(pattern, options=None, q_len=37, kv_len=37):
    tensors = tuple(t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=q_len, kv_len=kv_len, dim=16))
    found = block_sparse_attention(*tensors, pattern, options, backend="flex")
    wanted = block_sparse_attention(*(t.double() for t in tensors), pattern, options, backend="reference")
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, (32, 16), (16, 32)])
def test_patterns(causal, block):
    compare(random_pattern(4, 37, 37, block, causal))


def test_fewer_queries_than_keys():
    compare(random_pattern(4, 21, 37, 16, True), q_len=21)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(key_mask=(torch.arange(37) >= torch.tensor([[9], [0]])).to(DEVICE)),
        AttentionOptions(documents=(torch.arange(37) >= torch.tensor([[9], [0]])).int().to(DEVICE)),
        AttentionOptions(window=5),
        AttentionOptions(softcap=1.5, scale=0.5),
    ],
    ids=["padding", "documents", "window", "softcap"],
)
def test_options(options):
    compare(random_pattern(4, 37, 37, 16, True), options)


def test_rows_without_a_key_are_zero():
    compare(random_pattern(4, 37, 37, 16, True, 0.0))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="`dropout_p` 0.*'triton' or 'gather'"):
        block_sparse_attention(
            *inputs(), random_pattern(4, 37, 37, 8, True), AttentionOptions(dropout_p=0.1, seed=1), backend="flex"
        )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU it has gradients")
def test_gradients_on_a_cpu_are_refused():
    with pytest.raises(ValueError, match="no gradients on a CPU.*gather"):
        block_sparse_attention(*inputs(), random_pattern(4, 37, 37, 8, True), backend="flex")


@pytest.fixture
def compilations(monkeypatch):
    """Graphs that torch.compile made, in order."""
    graphs = []

    def compiler(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(flex, "_COMPILERS", {"cuda": compiler, "cpu": compiler})
    flex._compiled.cache_clear()
    return graphs


def call(length, pattern=None):
    pattern = pattern or random_pattern(4, length, length, 8, True)
    tensors = (t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=length, kv_len=length, dim=16))
    return block_sparse_attention(*tensors, pattern, backend="flex")


@torch.no_grad()
def test_every_shape_is_compiled_and_every_pattern_of_it_runs_the_same(compilations):
    for count, length in enumerate(range(8, 88, 8), 1):
        call(length)
        call(length, random_pattern(4, length, length, 8, True, 0.3))
        assert len(compilations) == count


@torch.no_grad()
def test_masks_go_with_their_pattern(compilations):
    pattern = random_pattern(4, 37, 37, 16, True)
    call(37, pattern)
    alive = weakref.ref(pattern)
    del pattern
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("inside", [True, False])
def test_a_mask_of_validation_serves_training(inside):
    with torch.inference_mode(inside):
        pattern = random_pattern(4, 37, 37, 16, True)
    with torch.inference_mode():
        mask = flex._block_mask(pattern, None, DEVICE)
    held = [*vars(mask).values(), *(cell.cell_contents for cell in mask.mask_mod.__closure__)]
    assert not any(thing.is_inference() for thing in held if isinstance(thing, torch.Tensor))
    assert sum(isinstance(thing, torch.Tensor) for thing in held) >= 9


def test_tiles_divide_the_blocks_with_the_names_that_torch_reads():
    assert flex._tiles((128, 256)) is None
    tiles = flex._tiles((64, 96))
    assert (tiles.pop("fwd_BLOCK_M"), tiles.pop("fwd_BLOCK_N")) == (64, 32)
    assert flex._tiles((256, 64))["fwd_BLOCK_M"] == 128
    with pytest.raises(ValueError, match=r"factor of 16.*\(64, 8\)"):
        flex._tiles((64, 8))
    known = typing.get_type_hints(FlexKernelOptions)
    assert {name.removeprefix("fwd_") for name in flex._tiles((64, 96))} <= set(known)


def test_small_blocks_let_inductor_choose_the_backward_tiles(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **settings: asked.append(settings))
    flex._compiled.__wrapped__("inductor", True, ())
    flex._compiled.__wrapped__("inductor", False, ())
    assert [settings["options"] for settings in asked] == [{"max_autotune": True}, None]
