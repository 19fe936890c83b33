"""Documents packed into a row: each is computed, probed and pruned as if it stood alone."""

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sparse_prune import AttentionPruner, BlockPattern, ConstantSchedule
from sparse_prune.attention import attach, hf_attention
from sparse_prune.kernels import BACKENDS, Backend, reference
from sparse_prune.scores import Influence
from support.families import SMALL

BLOCK, LENGTHS = 8, (5, 19, 16)
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "window": lambda: MistralForCausalLM(MistralConfig(sliding_window=6, **SMALL)),
    "both": lambda: Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=6, head_dim=8, **KINDS, **SMALL)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, attn_logit_softcapping=2.0, sliding_window=6, **SMALL)
    ),
}


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (length,), generator=generator) for length in lengths]


def flattened(lengths=LENGTHS):
    """As `transformers.Trainer` would give it to a model, with positions and cumulative lengths."""
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": d} for d in documents(lengths)])
    batch.pop("labels")
    return batch


GIVEN = {
    "positions": {"drop": ("cu_seq_lens_q", "cu_seq_lens_k"), "more": {"use_cache": False}},
    "lengths": {"drop": (), "more": {}},  # transformers lets documents see each other where it makes a cache
    "lengths and a mask of ones": {"drop": (), "more": {"attention_mask": torch.ones(1, sum(LENGTHS))}},
}


def outcome(model, calls):
    """Logits and gradients of a loss over all tokens."""
    model.zero_grad()
    logits = torch.cat([model(**call).logits for call in calls], 1)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_alike(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=2e-4, rtol=2e-4)
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", MODELS)
def test_a_flattened_batch_equals_its_documents_alone(name, given):
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "softcap":
        model.set_attn_implementation("eager")
    wanted = outcome(model, [{"input_ids": d[None], "use_cache": False} for d in documents()])
    drop, more = GIVEN[given].values()
    call = {key: value for key, value in flattened().items() if key not in drop} | more
    handles = attach(model)
    assert_alike(outcome(model, [call]), wanted)
    length = sum(LENGTHS)
    for mode, backend in (
        ("masked", "gather"),
        ("sparse", "gather"),
        ("sparse", "reference"),
        ("sparse", "sdpa"),
        ("sparse", "triton"),
    ):
        if name == "softcap" and backend == "sdpa":
            continue
        block = 16 if backend == "triton" else BLOCK
        for handle in handles:
            handle.pattern = BlockPattern.dense(4, length, length, block, True)
            handle.mode, handle.backend = mode, backend
        assert_alike(outcome(model, [call]), wanted)


@pytest.mark.parametrize(("backend", "block"), [("gather", BLOCK), ("triton", 16)])
@pytest.mark.parametrize("given", ["positions", "lengths"])
@pytest.mark.parametrize("name", ["plain", "window"])
def test_a_pruned_row_equals_documents_with_their_parts_of_the_pattern(name, given, backend, block):
    if backend == "triton":
        pytest.importorskip("triton")
    lengths = (block, 3 * block, 2 * block)
    drop, more = GIVEN[given].values()
    call = {key: value for key, value in flattened(lengths).items() if key not in drop} | more
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    keeps = [(torch.rand(4, 6, 6, generator=generator) < 0.5) | torch.eye(6, dtype=torch.bool) for _ in range(2)]
    handles, start, alone = attach(model), 0, []
    for handle in handles:
        handle.mode, handle.backend = "sparse", backend

    def prune(rows, length):
        for handle, keep in zip(handles, keeps, strict=True):
            handle.pattern = BlockPattern(keep[:, rows, rows], (block, block), True, length, length)

    weights = torch.randn(1, sum(lengths), 1, generator=generator)
    model.zero_grad()
    for length in lengths:
        prune(slice(start // block, (start + length) // block), length)
        logits = model(input_ids=call["input_ids"][:, start : start + length], use_cache=False).logits
        (logits.square() * weights[:, start : start + length]).sum().backward()
        alone.append(logits.detach())
        start += length
    wanted = torch.cat(alone, 1), [p.grad.clone() for p in model.parameters()]
    prune(slice(None), sum(lengths))
    model.zero_grad()
    logits = model(**call).logits
    (logits.square() * weights).sum().backward()
    assert_alike((logits.detach(), [p.grad for p in model.parameters()]), wanted)


@pytest.mark.parametrize("mode", ["masked", "sparse"])
def test_blocks_between_documents_are_skipped(mode, monkeypatch):
    patterns = []

    def attend(query, key, value, pattern, options):
        patterns.append(pattern)
        return reference.attend(query, key, value, pattern, options)

    spy = Backend("spy", attend, rank=1, suits_moving=lambda *call: True)
    monkeypatch.setitem(BACKENDS, "spy", spy)
    monkeypatch.setattr("sparse_prune.kernels.backends.BACKENDS", {"spy": spy})
    model = MODELS["window"]()
    for handle in attach(model):
        handle.pattern, handle.mode, handle.backend = BlockPattern.dense(4, 48, 48, BLOCK, True), mode, "spy"
    model(**flattened((8, 24, 16)))
    wanted = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3), torch.ones(2, 2)).tril().bool()
    assert all(pattern.keep.equal(wanted.expand(4, -1, -1)) for pattern in patterns)
    assert patterns[0] is not patterns[1]  # of each layer its own, made once per forward pass
    assert len(patterns) == 2


def test_a_block_that_few_documents_reach_is_worth_what_those_give_it():
    """Rows of four documents and rows of one: far blocks are judged by the latter alone."""
    model = MODELS["plain"]()
    pruner = AttentionPruner(ConstantSchedule(final=0.0), block_size=BLOCK, statistic="mean")
    pruner.attach(model)
    scores = {}
    rows = {(40,): {"input_ids": flattened((40,))["input_ids"]}, (8, 8, 16, 8): flattened((8, 8, 16, 8))}
    for lengths, row in rows.items():
        pruner.restart()
        pruner.probe(True)
        model(**row)
        pruner.update(1)
        scores[lengths] = [state.scores.value() for state in pruner.layers.values()]
    pruner.restart()
    pruner.probe(True)
    for row in rows.values():
        model(**row)
    pruner.update(1)
    within = torch.block_diag(torch.ones(1, 1), torch.ones(1, 1), torch.ones(2, 2), torch.ones(1, 1)).bool()
    beyond = torch.ones(5, 5).tril().bool() & ~within
    for state, alone, apart in zip(pruner.layers.values(), *scores.values(), strict=True):
        both = state.scores.value()
        torch.testing.assert_close(both[:, beyond], alone[:, beyond])
        assert (alone[:, beyond] > 0).all()
        assert not apart[:, beyond].any()  # hidden in any case, and first to go
        torch.testing.assert_close(both[:, within], (alone + apart)[:, within] / 2)


def test_a_score_of_its_own_counts_per_document_too():
    model = MODELS["window"]()
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=BLOCK, score=Influence())
    pruner.attach(model)
    pruner.probe(True)
    model(**flattened((8, 24, 16))).logits.square().sum().backward()
    weight = next(iter(pruner.layers.values())).layer.score_sums.counts[0, 0]
    within = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3), torch.ones(2, 2)).tril().bool()
    assert torch.equal(weight > 0.5, within)
    report = pruner.update(1)
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_documents_that_see_each_other_are_told_of_once(caplog):
    hf_attention._say_that_documents_mix.cache_clear()
    model, batch = MODELS["plain"](), flattened()
    for handle in attach(model):
        handle.probe_block_size = (BLOCK, BLOCK)
    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    model(**batch)
    padding = torch.arange(24).expand(1, -1) >= 4
    model(input_ids=batch["input_ids"][:, :24], attention_mask=padding, position_ids=padding.cumsum(1) - 1)
    assert not caplog.records
    for _ in range(2):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    (record,) = caplog.records
    assert "positions of LlamaAttention restart" in record.getMessage()
    assert "Pass `use_cache=False`" in record.getMessage()


def test_lengths_that_are_not_of_the_row_are_refused():
    model = MODELS["plain"]()
    attach(model)
    with pytest.raises(ValueError, match=r"`cu_seqlens` must ascend from 0 to 40, got \[0, 5, 39\]"):
        model(input_ids=flattened()["input_ids"], cu_seq_lens_q=torch.tensor([0, 5, 39]))
