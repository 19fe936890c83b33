"""The Triton kernels against the reference: in the interpreter here, compiled where there is a GPU."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_prune import BlockPattern
from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from support.cases import inputs, random_pattern, run

pytest.importorskip("triton")
from sparse_prune.kernels.triton import ops, tables  # noqa: E402
from sparse_prune.kernels.triton.configs import Call, launch_config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(tensors, dtype):
    return tuple(t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors)


def assert_close_to_reference(tensors, pattern, options=None, dtype=torch.float32):
    """Judged by the float64 reference on the same rounded inputs, with eager's own error as the measure."""
    low = on_device(tensors, dtype)
    exact = tuple(t.detach().double().requires_grad_() for t in low)
    truth = run(exact, pattern, options, "reference")
    eager, found = run(low, pattern, options, "reference"), run(low, pattern, options, "triton")
    for t, e, f in zip(truth, eager, found, strict=True):
        assert f.dtype == dtype
        assert f.shape == t.shape
        allowed = 3.0 * (e.double() - t).abs().max() + 16 * torch.finfo(dtype).eps * t.abs().max().clamp(min=1.0)
        assert (f.double() - t).abs().max() <= allowed


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, (32, 16), (16, 32)])
@pytest.mark.parametrize("length", [1, 48, 53])
def test_output_and_gradients(causal, block, length):
    pattern = random_pattern(4, length, length, block, causal, 0.6)
    assert_close_to_reference(inputs(batch=1, q_len=length, kv_len=length, dim=16), pattern)


@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_sizes(dim, dtype):
    tensors = inputs(batch=1, heads=2, kv_heads=1, q_len=70, kv_len=70, dim=dim)
    assert_close_to_reference(tensors, random_pattern(2, 70, 70, 32, True, 0.6), dtype=dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [40, 64])
def test_two_key_tiles_a_turn_that_lie_apart(causal, dim):
    call = Call(dim, torch.float16, (64, 64))
    assert launch_config("forward", 90, call).span == 2
    assert launch_config("forward", 90, call._replace(masks=1)).span == 1
    pattern = random_pattern(4, 389, 389, 64, causal, 0.6)
    assert {int(row.sum()) % 2 for row in pattern.keep[:, 4]} == {0, 1}  # one is left over in some
    assert_close_to_reference(inputs(batch=1, q_len=389, kv_len=389, dim=dim), pattern, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer and a GPU")
def test_compute_sanitizer_finds_nothing():
    call = (
        "import torch; from sparse_prune import BlockPattern as P; from sparse_prune.kernels import *;"
        "x = torch.randn(1, 4, 200, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True);"
        "p = P(torch.rand(4, 4, 4) < 0.6, (64, 64), True, 200, 200);"
        "block_sparse_attention(x, x, x, p, backend='triton').sum().backward(); torch.cuda.synchronize()"
    )
    command = ["compute-sanitizer", "--error-exitcode", "7", sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_group_size(kv_heads):
    assert_close_to_reference(inputs(kv_heads=kv_heads, dim=16), random_pattern(4, 37, 37, 16, True))


def test_fewer_queries_than_keys():
    assert_close_to_reference(inputs(q_len=21, kv_len=53, dim=16), random_pattern(4, 21, 53, 16, True))


def _mask(q_len=37, kv_len=37):
    return (torch.rand(2, 1, q_len, kv_len, generator=torch.Generator().manual_seed(3)) < 0.6).to(DEVICE)


def _rows_of_heads(length=37, heads=4):
    """Every head misses rows of its own."""
    shown = torch.arange(length) // 10 != torch.arange(heads)[:, None] % 4
    return shown[None, ..., None].expand(2, heads, length, length).to(DEVICE)


def _documents(length=37):
    """Packed sequences: two documents in each sample, which do not see each other."""
    return (torch.arange(length) >= torch.tensor([[length // 2], [length // 7]])).int().to(DEVICE)


OPTIONS = {
    "none": lambda q_len, kv_len: {},
    "right padding": lambda q_len, kv_len: {"key_mask": torch.arange(kv_len) < torch.tensor([[kv_len // 2], [kv_len]])},
    "left padding": lambda q_len, kv_len: {"key_mask": torch.arange(kv_len) >= torch.tensor([[kv_len // 2], [0]])},
    "mask": lambda q_len, kv_len: {"attn_mask": _mask(q_len, kv_len)},
    "padding as a mask": lambda q_len, kv_len: {"attn_mask": _mask(1, kv_len)},
    "documents": lambda q_len, kv_len: {"documents": _documents(kv_len)},
    "softcap": lambda q_len, kv_len: {"softcap": 1.5},
    "scale": lambda q_len, kv_len: {"scale": 0.7},
    "dropout": lambda q_len, kv_len: {"dropout_p": 0.3, "seed": 5},
    "window": lambda q_len, kv_len: {"window": kv_len // 4},
    "window and more": lambda q_len, kv_len: {"window": kv_len // 4, "documents": _documents(kv_len), "softcap": 2.0},
    "all": lambda q_len, kv_len: {
        "dropout_p": 0.3, "seed": 2**40, "softcap": 2.0, "attn_mask": _mask(q_len, kv_len), "scale": 0.5,
    },
}  # fmt: skip
"""Name -> what a call of two samples asks for, by its lengths."""


def check_options(name, causal, q_len, kv_len, block, dim, dtype):
    if not causal and "window" in name:
        pytest.skip("windows are for causal patterns")
    if not causal and q_len != kv_len and name == "documents":
        pytest.skip("documents of a bidirectional pattern need as many queries as keys")
    options = AttentionOptions(**OPTIONS[name](q_len, kv_len)).with_masks(lambda mask: mask.to(DEVICE))
    pattern = random_pattern(4, q_len, kv_len, block, causal, 0.7)
    assert_close_to_reference(inputs(q_len=q_len, kv_len=kv_len, dim=dim), pattern, options, dtype)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_options(name, causal):
    check_options(name, causal, 37, 37, 16, 16, torch.float32)


@pytest.mark.parametrize("name", ["window", "all"])
def test_options_with_fewer_queries_than_keys(name):
    check_options(name, True, 21, 53, 16, 16, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies bfloat16 as integers; float32 runs above")
class TestOnAGpu:
    """Blocks, heads and dtypes of real models: other tiles and other code than what the interpreter runs."""

    @pytest.mark.parametrize("name", OPTIONS)
    @pytest.mark.parametrize(("causal", "q_len"), [(True, 1000), (True, 300), (False, 1000)])
    @pytest.mark.parametrize("block", [64, 128])
    @pytest.mark.parametrize("dim", [80, 128])
    def test_options(self, name, causal, q_len, block, dim):
        check_options(name, causal, q_len, 1000, block, dim, torch.bfloat16)

    @pytest.mark.parametrize("name", ["none", "all"])
    @pytest.mark.parametrize("block", [64, 128])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_heads_and_dtypes(self, name, block, dim, dtype):
        check_options(name, True, 1000, 1000, block, dim, dtype)


@pytest.fixture(params=[True, False], ids=["groups together", "heads apart"])
def together(request, monkeypatch):
    """Whether a program of dkdv adds up the gradients of a whole group; asserts that every launch does so, or none."""
    monkeypatch.setattr(tables, "processors", lambda device: 1 if request.param else 10**6)
    inner, seen = ops.heads_of_a_program, set()

    def members(*args):
        seen.add(inner(*args) > 1)
        return inner(*args)

    monkeypatch.setattr(ops, "heads_of_a_program", members)
    yield
    assert seen == {request.param}


@pytest.mark.parametrize("name", ["none", "rows of heads", "documents", "all"])
@pytest.mark.parametrize(("group", "dim"), [(3, 24), (4, 16)])
@pytest.mark.usefixtures("together")
def test_key_gradients_of_a_group(name, group, dim):
    """Masks and dropout are each head's own; a column of blocks is empty; the last tile is ragged."""
    heads = 2 * group
    given = {"attn_mask": _rows_of_heads(heads=heads)} if name == "rows of heads" else OPTIONS[name](37, 37)
    options = AttentionOptions(**given).with_masks(lambda mask: mask.to(DEVICE))
    keep = random_pattern(heads, 37, 37, 16, True, 0.7).keep.clone()
    keep[:group, :, 1] = False
    pattern = BlockPattern(keep, (16, 16), True, 37, 37)
    assert_close_to_reference(inputs(heads=heads, dim=dim), pattern, options)


@pytest.mark.parametrize("block", [(64, 32), (32, 64)])
@pytest.mark.usefixtures("together")
def test_key_gradients_of_a_group_in_half_precision(block):
    pattern = random_pattern(4, 70, 133, block, True, 0.6)
    assert_close_to_reference(inputs(kv_heads=1, q_len=70, kv_len=133, dim=64), pattern, dtype=torch.float16)


def test_empty_rows_give_zeros_and_zero_gradients():
    pattern = BlockPattern(torch.zeros(4, 3, 3, dtype=torch.bool), (16, 16), True, 37, 37)
    for tensor in run(on_device(inputs(dim=16), torch.float32), pattern, None, "triton"):
        assert tensor.abs().max() == 0


def test_pruned_blocks_are_never_read():
    pattern = random_pattern(4, 48, 48, 16, True)
    keep = pattern.keep.clone()
    keep[:, :, 1] = False
    query, key, value = on_device(inputs(q_len=48, kv_len=48, dim=16), torch.float32)
    with torch.no_grad():
        key[:, :, 16:32] = torch.nan
        value[:, :, 16:32] = torch.nan
    for tensor in run((query, key, value), BlockPattern(keep, (16, 16), True, 48, 48), None, "triton"):
        assert torch.isfinite(tensor).all()


@pytest.mark.usefixtures("together")
def test_same_input_same_bits_and_strides_do_not_matter():
    tensors = on_device(inputs(dim=16), torch.float32)
    pattern = random_pattern(4, 37, 37, 16, True)
    one, two = (run(tensors, pattern, None, "triton") for _ in range(2))
    turned = tuple(t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors)
    three = run(turned, pattern, None, "triton")
    for a, b, c in zip(one, two, three, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@given(
    st.integers(1, 50),
    st.integers(0, 20),
    st.sampled_from([16, (16, 32), (32, 16)]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_any_pattern(q_len, extra, block, causal, density, seed):
    pattern = random_pattern(2, q_len, q_len + extra, block, causal, density, seed)
    tensors = inputs(batch=1, heads=2, kv_heads=1, q_len=q_len, kv_len=q_len + extra, dim=16, seed=seed)
    assert_close_to_reference(tensors, pattern)


def test_more_sequences_than_a_grid_takes_are_refused():
    query = torch.empty(1, 1, 1, 16).expand(65536, -1, -1, -1)
    with pytest.raises(ValueError, match="at most 65535 sequences for backend 'triton', got 65536.*gather"):
        block_sparse_attention(query, query, query, random_pattern(1, 1, 1, 16, True), backend="triton")


def test_masks_that_are_not_given_cost_nothing(monkeypatch):
    """Their stand-ins are made once a device, not once a launch."""
    tensors, pattern = on_device(inputs(dim=16), torch.float32), random_pattern(4, 37, 37, 16, True)
    run(tensors, pattern, None, "triton")
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("made anew"))
    run(tensors, pattern, None, "triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 8}, "factor 16"),
        ({"dim": 300}, "head_dim"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_unsupported_input_names_limit_and_remedy(changes, message):
    tensors = on_device(inputs(dim=changes.get("dim", 16)), changes.get("dtype", torch.float32))
    pattern = random_pattern(4, 37, 37, changes.get("block", 16), True)
    with pytest.raises(ValueError, match=f"{message}.*gather|gather.*{message}"):
        block_sparse_attention(*tensors, pattern, backend="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = tuple(t.detach().float() for t in inputs(dim=16))
    with pytest.raises(ValueError, match="CUDA.*gather"):
        block_sparse_attention(*tensors, random_pattern(4, 37, 37, 16, True), backend="triton")


@pytest.mark.slow
def test_the_gpu_benchmark_checks_and_measures(tmp_path):
    """Here in the interpreter at a toy length: the script works, its times mean nothing."""
    script = Path(__file__).parents[2] / "benchmarks" / "attention.py"
    sizes = {"lengths": 64, "sparsities": 0.3, "head-dims": 16, "groups": 2, "heads": 2, "block": 16}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    subprocess.run([sys.executable, script, *options, "--output", tmp_path / "out.json"], check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward", "both"}
    assert all(0 < row["decode"]["union_density"] <= 1 for row in rows)
    assert all(row["sparsity"] == pytest.approx(0.3, abs=0.1) for row in rows)
    assert (tmp_path / "out.png").stat().st_size > 1000
