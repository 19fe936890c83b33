"""What a run on a GPU goes through, small: on a pretended device where there is none (`support/pretend_cuda`).

`test_pretend_cuda.py` runs this file and what else is marked `gpu`.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from sparse_prune import AttentionPruner, Constraints, CubicSchedule
from sparse_prune import scores as all_scores
from sparse_prune.cache import PatternCache
from sparse_prune.callbacks import KernelSwap, Retrieval, SparsityLogger
from sparse_prune.evaluation import cache_cost, fresh_cache, mean_loss
from sparse_prune.export import load, save_pretrained
from sparse_prune.kernels import BACKENDS, AttentionOptions, block_sparse_attention
from sparse_prune.recipes.base.loader import ResumableDataLoader
from support.cases import random_pattern
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def own_measurements(tmp_path, monkeypatch):
    """What is measured here is no one else's; Inductor knows no pretended device."""
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path))
    if torch.cuda.get_device_name() == "pretended":
        monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], skips_on=()))


LOOPS = dict(
    re.findall(
        r"## ([^\n]+)\n\n```py\n(.*?)```", (Path(__file__).parents[1] / "docs" / "loops.md").read_text(), re.DOTALL
    )
)


def test_what_mixes_devices_raises():
    """So that everything below can fail."""
    here, there = torch.ones(2, device="cuda"), torch.ones(2)
    assert (here + torch.tensor(1.0)).device.type == "cuda"
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        there.add_(here)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.cross_entropy(torch.ones(2, 3, device="cuda"), torch.zeros(2, dtype=torch.long))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    query, pattern = torch.ones(1, 2, 32, 16, device="cuda"), random_pattern(2, 32, 32, 16, True)
    with pytest.raises((RuntimeError, ValueError), match="device|cpu"):
        block_sparse_attention(query, query.cpu(), query.cpu(), pattern, backend="triton")


def test_what_waits_raises_where_that_is_forbidden():
    here = torch.ones(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        here.to("cpu", non_blocking=True)
        for wait in (here.cpu, here.tolist, here[0].item, here.nonzero, lambda: here[here > 0]):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(model):
    model = model.to("cuda")
    assert all(tensor.device.type == "cuda" for tensor in (*model.parameters(), *model.buffers()))
    return model


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_the_docs(name, tmp_path):
    code = LOOPS[name].replace('accelerator="cpu"', 'accelerator="cuda"').replace(", use_cpu=True", "")
    code = code.replace('"gather"', '"triton"').replace("block_size=8", "block_size=16")
    rows = torch.randint(32, (12, 1, 64), generator=torch.Generator().manual_seed(0))
    model = on_gpu(tiny_llama(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    told = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "batches": list(rows.to("cuda")),
        "rows": [{"input_ids": row[0], "labels": row[0]} for row in rows[:1]],
        "folder": str(tmp_path),
        "checkpoint": tmp_path / "checkpoint.pt",
    }
    before = model.lm_head.weight.detach().clone()
    exec(code, told)
    pruner = told["pruner"]  # a measurement may have reverted what settled
    assert pruner.total_sparsity > 0.1 or all(state.reverted for state in pruner.layers.values())
    assert not torch.equal(before, model.lm_head.weight)


SCORES = {
    name: getattr(all_scores, name)
    for name in ("Max", "Mean", "MeanSquare", "MassShare", "MassGradient", "OutputChange", "Influence", "FarField")
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score(name):
    model = on_gpu(tiny_llama())
    constraints = Constraints(far_field="head") if name == "FarField" else Constraints(sink_blocks=1)
    schedule = CubicSchedule(final=0.4, end_step=2)
    pruner = AttentionPruner(schedule, block_size=16, score=SCORES[name](), constraints=constraints, patience=1)
    pruner.attach(model)
    for step, row in enumerate(torch.randint(32, (3, 1, 64)).to("cuda"), start=1):
        pruner.probe(True)
        model(row, labels=row).loss.backward()
        pruner.probe(False)
        pruner.update(step)
    assert pruner.total_sparsity > 0.2


def small(**changes):
    torch.manual_seed(0)
    return TinyModule(tiny_llama(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **changes))


def fit(tmp_path, module, steps, resume=None):
    callback = pruning(block_size=16, swap=KernelSwap("auto", tuning_seconds=1.0), logging=SparsityLogger())
    run = trainer(
        tmp_path, [callback], steps, accelerator="gpu", devices=1, logger=pl.loggers.CSVLogger(tmp_path),
        gradient_clip_val=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    run.fit(module, batches(batch_size=1), ckpt_path=resume, weights_only=False)
    return callback, run


def test_a_run_from_its_first_step_to_its_cache(tmp_path):
    """Callbacks in a Trainer, the swap by measurement, a resume, the export, its evaluation and its cache."""
    module, part, again = (small(attention_dropout=0.1) for _ in range(3))
    callback, run = fit(tmp_path / "whole", module, 10)
    states = callback.pruner.layers.values()
    assert {state.layer.last_shape.device.type for state in states} == {"cuda"}
    assert {event.layer for event in callback.swap.events} == set(callback.pruner.layers)
    for event in callback.swap.events:
        assert {"dense", "triton", "gather"} <= event.measured_ms.keys()

    _, cut = fit(tmp_path / "cut", part, 4)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    fit(tmp_path / "again", again, 5, resume=tmp_path / "cut.ckpt")
    assert [*part.losses, *again.losses] == module.losses[:5]

    model = on_gpu(module.model).eval()
    save_pretrained(model, tmp_path / "pruned", pruner=callback.pruner)
    loaded = load(tmp_path / "pruned").to("cuda")
    tokens = torch.randint(32, (1, 64), device="cuda")
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        torch.testing.assert_close(loaded(tokens, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-4)
        cache = PatternCache(loaded)
        parts = [tokens[:, :40], *tokens[:, 40:].split(8, 1)]
        found = torch.cat([loaded(part, past_key_values=cache).logits for part in parts], 1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    caches = partial(fresh_cache, loaded)
    assert 0 < mean_loss(loaded, tokens.cpu(), caches, chunk=32) < 10
    assert cache_cost(loaded, tokens[0].cpu(), caches, decode=2, chunk=32).kv_bytes > 0


def test_whole_heads_are_found(tmp_path):
    callback = pruning(retrieval=Retrieval(heads=0.25, probes=2), block_size=32, swap=KernelSwap("gather"))
    rows = torch.randint(32, (4, 128), generator=torch.Generator().manual_seed(1))
    run = trainer(tmp_path, [callback], steps=2, accelerator="gpu", devices=1)
    run.fit(
        TinyModule(tiny_llama(num_attention_heads=2, num_key_value_heads=1)), ResumableDataLoader(rows, batch_size=1)
    )
    assert sum(map(len, callback.pruner.constraints.protected_heads.values())) == 1  # of 4


@pytest.mark.parametrize(
    ("backend", "options"),
    # SDPA has no soft cap.
    [("sdpa", "none")] + [(name, options) for name in ("gather", "reference", "triton") for options in ("none", "all")],
)
def test_a_backend(backend, options):
    """As on the host; results and gradients stay where query, key and value are."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 48, 16, generator=generator) for heads in (4, 2, 2)]
    given = AttentionOptions()
    if options == "all":
        given = AttentionOptions(
            key_mask=torch.arange(48) < torch.tensor([[40], [48]]),
            documents=(torch.arange(48) >= 20).int().expand(2, 48).contiguous(),
            softcap=3.0, dropout_p=0.3, seed=5,
        )  # fmt: skip
    pattern = random_pattern(4, 48, 48, 16, True, 0.6)

    def results(device, backend):
        moved = [tensor.to(device).requires_grad_() for tensor in tensors]
        options = given.with_masks(lambda mask: mask.to(device))
        output = block_sparse_attention(*moved, pattern, options, backend=backend)
        found = [output, *torch.autograd.grad(output.square().sum(), moved)]
        assert {tensor.device.type for tensor in found} == {device}
        return [tensor.detach().cpu() for tensor in found]

    for there, here in zip(results("cpu", "reference"), results("cuda", backend), strict=True):
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
