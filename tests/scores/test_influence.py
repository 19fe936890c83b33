"""Influence is the change of a loss: held against attention from which a block is really taken, in float64."""

import pytest
import torch

from sparse_prune import BlockPattern, Influence
from sparse_prune.kernels import AttentionOptions, probe_score
from sparse_prune.scores import AttentionCall

BATCH, HEADS, KV_HEADS, LENGTH, DIM, BLOCK = 2, 4, 2, 22, 8, 4


def attention(query, key, value, allowed, options):
    """Plain attention over the tokens that are allowed, (batch, num_heads, q_len, kv_len); rows without any give 0."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.mT * (DIM**-0.5 if options.scale is None else options.scale)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0) @ value


def case(options, causal, sparsity):
    torch.manual_seed(0)
    query, gradient = (torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(BATCH, KV_HEADS, LENGTH, DIM, dtype=torch.float64) for _ in range(2))
    pattern = BlockPattern.dense(HEADS, LENGTH, LENGTH, (BLOCK, BLOCK), causal)
    drop = torch.rand(pattern.keep.shape) < sparsity
    keep = pattern.possible & (~drop | torch.eye(drop.shape[1], dtype=torch.bool))
    pattern = BlockPattern(keep.expand_as(pattern.keep), (BLOCK, BLOCK), causal, LENGTH, LENGTH)
    hidden = options.token_mask(LENGTH, LENGTH, query.device)
    visible = torch.ones(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    if hidden is not None:
        visible = visible & hidden
    if options.key_mask is not None:  # the outputs of padded queries are not looked at
        visible = visible & options.key_mask[:, None, :, None]
    return query, key, value, gradient, pattern, visible


OPTIONS = {
    "plain": AttentionOptions(),
    "scale and soft cap": AttentionOptions(scale=0.7, softcap=2.0),
    "padding": AttentionOptions(key_mask=torch.arange(LENGTH) >= torch.tensor([[5], [0]])),
    "window": AttentionOptions(window=9),
    "documents": AttentionOptions(documents=(torch.arange(LENGTH) >= 10).int().expand(BATCH, -1)),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(
    ("name", "causal"),
    [(name, causal) for name in OPTIONS for causal in (True, False) if causal or name != "window"],
)
def test_it_is_the_change_of_a_linear_loss(name, causal, sparsity):
    options = OPTIONS[name]
    query, key, value, gradient, pattern, visible = case(options, causal, sparsity)
    seen = probe_score(
        Influence(), query, key, value, (BLOCK, BLOCK), causal=causal, options=options, gradient=gradient,
        pattern=pattern,
    )  # fmt: skip
    tokens = pattern.keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :LENGTH, :LENGTH]

    def loss_by_row(tokens):
        return (gradient * attention(query, key, value, visible & tokens, options)).sum(-1)  # (batch, heads, q_len)

    before, wanted = loss_by_row(tokens), torch.zeros_like(seen.sums[0])
    for row, col in torch.argwhere(pattern.possible).tolist():
        rows, cols = slice(row * BLOCK, (row + 1) * BLOCK), slice(col * BLOCK, (col + 1) * BLOCK)
        changed, kept = tokens.clone(), pattern.keep[:, row, col]
        changed[:, rows, cols] = ~kept[:, None, None]
        # A row that keeps nothing else has no softmax without the block: there is no price for its last key.
        left = (visible & changed).any(-1) & (visible & tokens).any(-1)
        change = ((loss_by_row(changed) - before) * left)[:, :, rows].sum((0, 2))
        wanted[:, row, col] = torch.where(kept, change, -change)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(seen.sums[0], wanted, rtol=2e-4, atol=2e-4)
    wanted = [[float(part.any()) for part in head.split(BLOCK)] for head in visible.any(-1).any(0)]
    assert seen.counts[0, ..., 0].expand(HEADS, -1).tolist() == wanted


def test_a_row_all_of_whose_mass_lies_in_a_block_stays_finite():
    query = torch.ones(1, 1, 8, 4) * 50
    key = torch.zeros(1, 1, 8, 4)
    key[:, :, :4] = 50.0
    seen = Influence().probe(
        AttentionCall(query, key, (4, 4), False, value=torch.randn(1, 1, 8, 4), gradient=torch.randn(1, 1, 8, 4))
    )
    assert seen.sums.isfinite().all()


def test_a_pruned_block_with_far_larger_logits_stays_finite():
    query, key = torch.ones(1, 1, 8, 4) * 50, torch.zeros(1, 1, 8, 4)
    key[:, :, :4] = 50.0
    keep = torch.eye(2, dtype=torch.bool)[None]
    gradient, value = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    call = AttentionCall(
        query, key, (4, 4), True, value=value, gradient=gradient, pattern=BlockPattern(keep, (4, 4), True, 8, 8)
    )
    # Given back, the block would take over: its rows' output becomes the mean of its values.
    own = torch.stack([value[:, :, 4 : 5 + i].mean(2) for i in range(4)], 2)
    change = (gradient[:, :, 4:] * (value[:, :, :4].mean(2, keepdim=True) - own)).sum()
    torch.testing.assert_close(Influence().probe(call).sums[0, 0, 1, 0].float(), -change, rtol=1e-3, atol=1e-3)


def test_a_pattern_of_other_blocks_is_refused():
    query = torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"`pattern` must have the block size.*\(4, 4\), 8, 8.*\(2, 2\), 8, 8"):
        AttentionCall(query, query, (4, 4), True, pattern=BlockPattern.dense(1, 8, 8, (2, 2), True))
