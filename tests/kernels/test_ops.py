"""The kernels as operators of torch.library."""

import math
from dataclasses import fields

import pytest
import torch

from sparse_prune.kernels import AttentionOptions, block_sparse_attention
from support.cases import inputs, random_pattern

pytest.importorskip("triton")
from sparse_prune.kernels.triton import ops  # noqa: E402
from sparse_prune.kernels.triton.attend import plan  # noqa: E402
from sparse_prune.kernels.triton.configs import Traits  # noqa: E402
from sparse_prune.kernels.triton.tables import Visits  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors():
    return tuple(t.detach().to(DEVICE, torch.float32).requires_grad_() for t in inputs(dim=16))


def arguments(pattern, kv_heads=2):
    tables, configs = plan(pattern, 16, torch.float32, DEVICE, Traits(), kv_heads, batch=2)
    return [tables, configs, pattern.causal, *ops.option_arguments(AttentionOptions())]


def test_operator_keeps_the_rules_of_torch_library():
    torch.library.opcheck(ops.block_sparse_attention, (*tensors(), *arguments(random_pattern(4, 37, 37, 16, True))))


def _packed():
    qkv = torch.randn(2, 37, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return [qkv[:, :, place].transpose(1, 2).requires_grad_() for place in range(3)]


def _transposed():
    return [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in tensors()]


def _expanded():
    query, key, value = (t.detach() for t in tensors())
    return [query.requires_grad_(), *(t[:, :1].expand(-1, 4, -1, -1).requires_grad_() for t in (key, value))]


@pytest.mark.parametrize("made", [_transposed, _packed, _expanded])
def test_operator_keeps_them_for_inputs_of_any_strides(made):
    """As models hand them over: (batch, length, heads, dim) turned, one projection for all three, KV heads repeated."""
    args, pattern = made(), random_pattern(4, 37, 37, 16, True)
    torch.library.opcheck(ops.block_sparse_attention, (*args, *arguments(pattern, args[1].shape[1])))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="Dynamo cannot take a frozen dataclass for a constant; compiled models are tested in attention/test_compile",
)
def test_a_compiled_function_has_no_graph_break_and_follows_its_pattern():
    patterns = {"now": random_pattern(4, 37, 37, 16, True, seed=1)}

    def attention(query, key, value):
        return block_sparse_attention(query * 2.0, key, value, patterns["now"], backend="triton").sin()

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for seed in (1, 2):
        patterns["now"] = random_pattern(4, 37, 37, 16, True, seed=seed)
        args = tensors()
        found, wanted = compiled(*args), attention(*args)
        assert torch.equal(found, wanted)
        for a, b in zip(torch.autograd.grad(found.sum(), args), torch.autograd.grad(wanted.sum(), args), strict=True):
            assert torch.equal(a, b)
        results.append(found)
    assert not torch.equal(*results)


def test_the_schema_knows_every_option():
    """An option that the operators do not carry would be ignored in silence."""
    schema = torch.ops.sparse_prune.block_sparse_attention_backward.default._schema
    given = {field.name for field in fields(AttentionOptions)}
    assert given < {argument.name for argument in schema.arguments}
    assert len(ops.option_arguments(AttentionOptions())) == len(given)


def test_the_log_sum_exp_which_has_no_gradient():
    pattern = random_pattern(4, 37, 37, 16, True, 0.8)
    pattern.keep.diagonal(dim1=1, dim2=2).fill_(True)  # no row without a key: its log-sum-exp is infinite
    args = tensors()
    _, lse = ops.block_sparse_attention(*args, *arguments(pattern))
    exact = [t.detach().double() for t in args]
    logits = exact[0] @ exact[1].repeat_interleave(2, 1).transpose(-1, -2) / 4.0
    mask = pattern.token_mask(37, 37, DEVICE)
    wanted = logits.masked_fill(~mask, -torch.inf).logsumexp(-1) / math.log(2.0)
    torch.testing.assert_close(lse.double(), wanted, atol=1e-5, rtol=1e-5)
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0].__setitem__(0, a[0][0].long()), "`start` must be contiguous int32"),
        (lambda a: a[0].__setitem__(3, a[0][3][:-1]), "`order` must have shape"),
        (lambda a: a[0].__setitem__(2, a[0][2] + 2), "`index` must lie in 0..1"),
        (lambda a: a[0][2].__setitem__(0, 9) or a[0].__setitem__(2, a[0][2].clone()), "`index` must lie in 0..1"),
        (lambda a: a[0].pop(), "12 entries"),
        (lambda a: a[1].__setitem__(0, 16), "must have shape"),
    ],
)
def test_tables_of_another_call_are_refused(change, message):
    pattern = random_pattern(4, 37, 37, 32, True)
    args = arguments(pattern)
    ops.block_sparse_attention(*tensors(), *args)
    change(args)
    with pytest.raises(ValueError, match=message):
        ops.block_sparse_attention(*tensors(), *args)


def test_tables_of_a_longer_call_are_refused():
    """They list as many programs, but keys that are not there."""
    args = arguments(random_pattern(4, 32, 64, 32, True))
    query, key, value = (t.detach().to(DEVICE, torch.float32) for t in inputs(q_len=32, kv_len=32, dim=16))
    with pytest.raises(ValueError, match="`index` must lie in 0..0"):
        ops.block_sparse_attention(query, key, value, *args)


def test_own_tables_are_never_read_back(monkeypatch):
    args = arguments(random_pattern(4, 37, 37, 16, True, seed=3))
    monkeypatch.setattr(Visits, "check", lambda *a: pytest.fail("read back"))
    output, _ = ops.block_sparse_attention(*tensors(), *args)
    output.sum().backward()


def test_offsets_past_32_bits():
    """Tokens so far apart that the last one lies behind 2**31 elements; pages that nobody touches cost no memory."""
    stride = 2**27
    far = [torch.empty(19 * stride + 16, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    near = [torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(i)).half() for i in range(3)]
    views = [whole.as_strided((1, 1, 20, 16), (0, 0, stride, 1)) for whole in far]
    for view, values in zip(views, near, strict=True):
        view.copy_(values)
    pattern = random_pattern(1, 20, 20, 16, True, 1.0)
    found, wanted = (
        block_sparse_attention(*(t.to(DEVICE) for t in given), pattern, backend="triton") for given in (views, near)
    )
    assert torch.equal(found, wanted)
