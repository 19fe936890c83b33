import copy
import functools
import pickle

import pytest
import torch

from sparse_prune import BlockPattern
from sparse_prune.attention import attach, detach
from support.nano import CausalSelfAttention

WIDTH, HEADS, LENGTH = 32, 4, 24


class Hook:
    """What accelerate puts on instances: a `partial` over the module, which keeps the `forward` that it runs."""

    def put(self, module):
        module._hf_hook, module._old_forward = self, module.forward
        module.forward = functools.update_wrapper(functools.partial(run_hooked, module), module.forward)

    def remove(self, module):
        module.forward = module._old_forward
        del module._old_forward, module._hf_hook


def run_hooked(module, *args, **kwargs):
    module.hooked = getattr(module, "hooked", 0) + 1
    return module._old_forward(*args, **kwargs)


def pruned(module, x):
    (handle,) = attach(module, x)
    handle.pattern = BlockPattern(torch.eye(3, dtype=torch.bool).expand(HEADS, 3, 3), (8, 8), True, LENGTH, LENGTH)
    handle.mode, handle.backend = "sparse", "gather"


@pytest.mark.parametrize("hook_first", [True, False])
@pytest.mark.parametrize("remove_first", [True, False])
def test_hooks_of_others_stay_and_calls_pass_through_us(hook_first, remove_first):
    torch.manual_seed(0)
    module, hook, x = CausalSelfAttention(WIDTH, HEADS).eval(), Hook(), torch.randn(2, LENGTH, WIDTH)
    own = module(x)
    reference = copy.deepcopy(module)
    pruned(reference, x)
    expected = reference(x)
    assert (expected - own).abs().max() > 1e-3
    if hook_first:
        hook.put(module)
    pruned(module, x)
    if not hook_first:
        hook.put(module)
    assert len(attach(module, x)) == 1
    before = getattr(module, "hooked", 0)
    torch.testing.assert_close(module(x), expected)
    assert module.hooked == before + 1
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), expected)
    for step in (hook.remove, detach) if remove_first else (detach, hook.remove):
        step(module)
    torch.testing.assert_close(module(x), own)


def test_a_partial_of_others_is_left_alone():
    module, x = CausalSelfAttention(WIDTH, HEADS).eval(), torch.randn(2, LENGTH, WIDTH)
    own = module(x)
    theirs = functools.partial(type(module).forward, module)
    module.forward = theirs
    detach(module)
    assert module.forward is theirs
    pruned(module, x)
    assert not torch.allclose(module(x), own)
    detach(module)
    assert module.forward is theirs
    torch.testing.assert_close(module(x), own)
