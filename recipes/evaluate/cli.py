"""The command line: measure dense and pruned, write the report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sparse_prune.recipes.causal_lm.data import TextDataModule
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.evaluate.report import EvaluationReport, LengthResult
from sparse_prune.recipes.finetune.machine import describe_machine
from sparse_prune.recipes.finetune.pretrained import load_tokenizer

from sparse_prune.evaluation import all_connections, cache_cost, fresh_cache, handles_of, mean_loss, retrieval
from sparse_prune.export import load

log = logging.getLogger(__name__)


def evaluate(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int = 1,
    decode: int = 32,
    chunk: int = 1024,
) -> list[LengthResult]:
    """Everything at every length, for a model as it stands.

    Args:
        model: A transformers causal language model; with patterns, its cache evicts by them.
        tokenizer: Its tokenizer.
        tokens: Held-out text, (sequences, longest length); cut for shorter lengths, so that all see the same text.
        lengths: Tokens.
        depths: Where needles lie, in [0, 1].
        prompts: Keys per depth; 0 leaves retrieval out.
        decode: Tokens to decode.
        chunk: Tokens per forward pass.
    """
    make_cache = partial(fresh_cache, model)
    results = []
    for length in lengths:
        whole = tokens.shape[1] // length * length
        sequences = tokens[:, :whole].reshape(-1, length)
        loss = mean_loss(model, sequences, make_cache, chunk)
        keys = retrieval(model, tokenizer, length, depths, prompts) if prompts else []
        needles = retrieval(model, tokenizer, length, depths, prompts, tokens[0].tolist()) if prompts else []
        cost = cache_cost(model, sequences[0], make_cache, decode, chunk)
        results.append(LengthResult(length, loss, keys, needles, cost))
        log.info("%s", results[-1])
    return results


def lengths_around(model: Any) -> list[int]:
    """Half, once, twice and four times the length that the patterns were learned at, as far as positions reach."""
    learned = max((handle.pattern.kv_len for handle in handles_of(model) if handle.pattern is not None), default=0)
    if not learned:
        raise ValueError("`lengths` must be given for a model without patterns, got none.")
    longest = getattr(model.config, "max_position_embeddings", None) or 4 * learned
    return [length for length in (learned // 2, learned, 2 * learned, 4 * learned) if 0 < length <= longest]


def main(args: list[str] | None = None) -> None:
    """Parse arguments, measure, write evaluation.md, .json and .png, print the table."""
    parser = argparse.ArgumentParser(prog="sparse-prune evaluate", description=__doc__)
    parser.add_argument("model", help="folder or hub repository that sparse_prune.export wrote")
    parser.add_argument("--dense", help="dense fine-tune to compare with; default: the same weights, nothing pruned")
    parser.add_argument("--text", default="stdlib", help="held-out text as the causal_lm recipe takes it: stdlib, ...")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 1/2, 1, 2 and 4 times the learned length")
    parser.add_argument("--sequences", type=int, default=2, help="sequences of the longest length for the loss")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="where needles lie, 0 to 1")
    parser.add_argument("--prompts", type=int, default=2, help="passkeys and needles per length and depth; 0: none")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode for the speed")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per forward pass")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32; default: as saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"), help="folder for the report")
    given = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"dtype": getattr(torch, given.dtype)} if given.dtype else {}
    model, tokenizer = load(given.model, **options).to(given.device), load_tokenizer(given.model)
    lengths = given.lengths or lengths_around(model)
    data = TextDataModule(
        given.model, given.text, max(lengths), train_sequences=1, val_sequences=1, test_sequences=given.sequences
    )
    data.setup("test")
    measure = {name: getattr(given, name) for name in ("depths", "prompts", "decode", "chunk")}
    measure |= {"tokenizer": tokenizer, "tokens": data.sequences["test"], "lengths": lengths}
    pruned = evaluate(model, **measure)
    if given.dense:
        twin = load_model(given.dense, model.dtype).to(given.device).eval()
        plain = evaluate(twin, **measure)
    else:
        with all_connections(model):
            plain = evaluate(model, **measure)
    setup = {
        "model": given.model,
        "dense model": given.dense or "the same weights, nothing pruned",
        "text": given.text,
        "sequences of the longest length": len(data.sequences["test"]),
        "prompts per depth": given.prompts,
        "dtype": str(model.dtype),
        "device": given.device,
        **describe_machine(),
    }
    report = EvaluationReport(setup, sparsity_of(model), tuple(given.depths), plain, pruned)
    path = report.write(given.output)
    print(f"{report.text()}\nReport: {path}")


def sparsity_of(model: Any) -> float:
    """Share of possible blocks that is pruned, over all layers with a pattern in force, in [0, 1]."""
    handles = [handle for handle in handles_of(model) if handle.pattern is not None]
    patterns = [handle.pattern for handle in handles if handle.pattern is not None]
    possible = sum(pattern.possible_count for pattern in patterns)
    kept = sum(p.kept_blocks if h.mode != "dense" else p.possible_count for p, h in zip(patterns, handles, strict=True))
    return 1.0 - kept / possible if possible else 0.0
