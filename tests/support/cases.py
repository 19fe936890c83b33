"""Inputs, patterns and runs that the tests of all backends share."""

import torch

from sparse_prune import BlockPattern
from sparse_prune.kernels import block_sparse_attention
from sparse_prune.pattern import num_blocks


def inputs(batch=2, heads=4, kv_heads=2, q_len=37, kv_len=37, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(count, length):
        return torch.randn(batch, count, length, dim, generator=generator, dtype=dtype).requires_grad_()

    return random(heads, q_len), random(kv_heads, kv_len), random(kv_heads, kv_len)


def random_pattern(heads, q_len, kv_len, block, causal, density=0.5, seed=0):
    sides = (block, block) if isinstance(block, int) else block
    shape = (heads, num_blocks(q_len, sides[0]), num_blocks(kv_len, sides[1]))
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    return BlockPattern(keep, sides, causal, q_len, kv_len)


def run(tensors, pattern, options, backend):
    output = block_sparse_attention(*tensors, pattern, options, backend=backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return output, *torch.autograd.grad(output, tensors, grad.to(output.dtype))
