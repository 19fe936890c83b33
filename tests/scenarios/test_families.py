"""Transformers' families at tiny sizes against a reference written by hand, and the table of them in the docs.

A family comes here by being in transformers' lists, with a config of its own fields made small (`support/zoo.py`).
"""

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from sparse_prune import BlockPattern
from sparse_prune.attention import attach, detach, list_layers
from sparse_prune.cache import PatternCache
from support import zoo
from support.by_hand import by_hand

log = logging.getLogger(__name__)
BLOCK = 8
CASES = {case.name: case for case in zoo.cases()}
VERDICTS = {}
DOCS = Path(__file__).parents[2] / "docs/models.md"
pytestmark = pytest.mark.slow


@dataclass
class Verdict:
    """What holds of a family."""

    pruned: int = 0
    """Layers."""
    dense: set[str] = field(default_factory=set)
    """Why layers stay dense."""
    caches: tuple[str, ...] = ()
    """With which caches a pruned decoder generates what it does without one."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Check -> what was found in place of what must hold."""


def tensor_of(output):
    for key in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, key, None), torch.Tensor):
            return getattr(output, key)
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


class Runs:
    """A model's output and gradients at tokens that are not padding."""

    def __init__(self, case, model):
        self.case, self.inputs = case, case.inputs(model)

    def __call__(self, model):
        model.zero_grad()
        with torch.enable_grad():
            output = tensor_of(model(**self.inputs))
            real = self.inputs.get("attention_mask")
            if real is not None and output.shape[:2] == real.shape and "decoder_input_ids" not in self.inputs:
                output = output[real.bool()]
            weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
            (output * weight).sum().backward()
        return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differs(found, wanted):
    """How far outputs and gradients are apart; None if they are not."""
    (output, gradients), (wanted_output, wanted_gradients) = found, wanted
    if output.shape != wanted_output.shape or not output.isfinite().all():
        return f"output {tuple(output.shape)} for {tuple(wanted_output.shape)}, finite: {bool(output.isfinite().all())}"
    distance = float((output - wanted_output).abs().max() / wanted_output.abs().max().clamp(min=1.0))
    if distance > 3e-4:
        return f"outputs by {distance:.1e}"
    top = max((float(g.abs().max()) for g in wanted_gradients.values() if g.numel()), default=0.0)
    for name, wanted_gradient in wanted_gradients.items():
        if not wanted_gradient.numel():
            continue
        off = (gradients.get(name, torch.zeros(())) - wanted_gradient).abs().max()
        if off > 3e-3 * wanted_gradient.abs().max() + 1e-5 * top:
            return f"gradient of {name} by {float(off):.1e}"
    return None


def set_patterns(handles, lengths, density):
    """Random patterns that keep the diagonal; their token masks by layer."""
    masks = {}
    for index, handle in enumerate(handle for handle in handles if handle.name in lengths):
        length = lengths[handle.name]
        dense = BlockPattern.dense(handle.num_heads, length, length, BLOCK, handle.causal)
        keep = torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(index)) < density
        keep |= torch.eye(dense.keep.shape[1], dtype=torch.bool)
        handle.pattern = BlockPattern(keep, (BLOCK, BLOCK), handle.causal, length, length)
        handle.mode, handle.backend = "sparse", "gather"
        masks[handle.name] = keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    return masks


def judge(run, model, own) -> Verdict:
    """What holds of a model that has given `own`, outputs and gradients, before anything was done to it."""
    verdict, reference = Verdict(), by_hand(model)
    layers = list_layers(model, run.inputs)
    verdict.dense = {re.sub(r" \(.*|, without.*", "", layer.problem) for layer in layers if layer.problem}
    if not any(layer.problem is None for layer in layers):
        return verdict
    expect = expecting(verdict)
    expect("the reference", lambda: differs(run(reference), own))
    handles = attach(model, run.inputs)
    expect("attached", lambda: differs(run(model), own))
    for handle in handles:
        handle.probe_block_size = (BLOCK, BLOCK)
    expect("probed", lambda: differs(run(model), own))
    lengths = {handle.name: handle.last_shape.q_len for handle in handles if handle.last_shape is not None}
    for handle in handles:
        handle.probe_block_size = None
        handle.take_statistics()
    handles = [handle for handle in handles if handle.aside is None]
    verdict.pruned = len(handles)
    set_patterns(handles, lengths, 2.0)
    expect("full pattern", lambda: differs(run(model), own))
    masks = set_patterns(handles, lengths, 0.5)
    kinds = {layer.name: layer.kind for layer in layers}
    if all(kinds[handle.name] == "transformers" for handle in handles):
        for name, mask in masks.items():
            reference.get_submodule(name)._keep = lambda q_len, kv_len, mask=mask: mask[None]
        wanted = run(reference)
        expect("pruned", lambda: differs(run(model), wanted))
        expect("something is pruned", lambda: None if differs(wanted, own) else "equal to own")
        for handle in handles:
            handle.mode = "masked"
        expect("masked", lambda: differs(run(model), wanted))
    if run.case.kind == "causal" and all(handle.causal for handle in handles):
        verdict.caches = tuple(generates(model, verdict))
        if not verdict.caches:
            verdict.wrong["cached"] = "refused with every cache"
    detach(model)
    expect("detached", lambda: differs(run(model), own))
    return verdict


def expecting(verdict):
    """Notes what a check finds wrong, and what it raises."""

    def expect(name, check):
        try:
            found = check()
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:300]}"
        if found is not None:
            verdict.wrong[name] = found

    return expect


@torch.no_grad()
def generates(model, verdict):
    """Caches with which the pruned model generates what it does without one."""
    ids = torch.randint(3, zoo.VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **settings)
    for name, make in (
        ("PatternCache", lambda: PatternCache(model)),
        ("DynamicCache", DynamicCache),
        ("its own", None),
    ):
        try:
            found = model.generate(ids, **({} if make is None else {"past_key_values": make()}), **settings)
        except Exception as error:  # refused, or not made for such a model
            log.info("%s: %s: %s", name, type(error).__name__, error)
            continue
        if torch.equal(found, wanted):
            yield name
        else:
            verdict.wrong[f"cached: {name}"] = f"{found[0, 20:].tolist()} for {wanted[0, 20:].tolist()}"


@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_what_it_did_and_what_its_pattern_says(name):
    try:
        model = CASES[name].make()
        run = Runs(CASES[name], model)
        own = run(model)
        assert own[0].isfinite().all()
    except Exception as error:
        pytest.skip(f"it does not run at sizes known by their names alone: {type(error).__name__}: {error}")
    VERDICTS[name] = verdict = judge(run, model, own)
    assert verdict.wrong == {}


def table():
    """The verdicts as they stand in docs/models.md: families of which the same holds share a line."""
    lines = defaultdict(list)
    for name, verdict in VERDICTS.items():
        dense = "; ".join(sorted(verdict.dense))
        if verdict.pruned:
            kind = f"pruned, {dense} dense" if dense else "pruned"
        else:
            kind = f"dense: {dense}" if dense else "no attention found"
        lines[not verdict.pruned, kind, ", ".join(verdict.caches)].append(name)
    rows = [
        f"| {kind} | {caches} | {', '.join(sorted(names))} |"
        for (_, kind, caches), names in sorted(lines.items(), key=lambda line: (line[0][0], -len(line[1]), line[0]))
    ]
    return "\n".join(["| Layers | Generates with | Families |", "| --- | --- | --- |", *rows])


def test_the_table_in_the_docs_is_what_was_found(tmp_path):
    """The last test: it looks at what the others found."""
    text = DOCS.read_text()
    if len(VERDICTS) < 90 or f"transformers {transformers.__version__}:" not in text:
        pytest.skip("only some families ran, or another transformers than that of the table")
    (tmp_path / "table.md").write_text(table())
    assert table() in text, f"docs/models.md must hold what is in {tmp_path / 'table.md'}"
