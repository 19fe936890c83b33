"""Measures loss, retrieval, KV cache and speed of a pruned model beside the dense one, and writes a report."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from sparse_prune.commands.evaluate.lengths import check_lengths, lengths_around
from sparse_prune.commands.evaluate.report import EvaluationReport, LengthResult, TaskResult
from sparse_prune.commands.evaluate.tasks import Asking
from sparse_prune.evaluation import (
    TASKS,
    all_connections,
    cache_cost,
    fresh_cache,
    handles_of,
    mean_loss,
)
from sparse_prune.export import export_header, load
from sparse_prune.files import user_path
from sparse_prune.machine import describe_machine
from sparse_prune.precision import fast_dtype
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.pretrained import load_model
from sparse_prune.recipes.causal_lm.sequences import make_sequences
from sparse_prune.recipes.causal_lm.trained_text import unseen_documents
from sparse_prune.refusals import refusals

log = logging.getLogger(__name__)
_RETRIEVED = ("passkey", "needle")


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
    """Measure a model at every length.

    Args:
        model: A transformers causal language model; with patterns, its cache evicts by them.
        tokenizer: Its tokenizer.
        tokens: Held-out text, (sequences, longest length); shorter lengths cut it, so that all use the same text.
        lengths: Tokens.
        depths: Where needles lie, in [0, 1].
        prompts: Passkeys and needles per depth; 0 leaves retrieval out.
        decode: Tokens to decode.
        chunk: Tokens per forward pass.

    Raises:
        ValueError: If an argument is out of range, before anything is measured.
    """
    check(model, tokenizer, tokens, lengths, depths, prompts, decode)
    text, make_cache = tokens[0].tolist(), partial(fresh_cache, model)
    results = []
    for length in lengths:
        whole = tokens.shape[1] // length * length
        sequences = tokens[:, :whole].reshape(-1, length)
        loss = mean_loss(model, sequences, make_cache, chunk)
        keys, needles = _retrieved(model, tokenizer, text, length, depths, prompts)
        cost = cache_cost(model, sequences[0], make_cache, decode, chunk)
        results.append(LengthResult(length, loss, keys, needles, cost))
        log.info("%s", results[-1])
    return results


def _retrieved(
    model: Any, tokenizer: Any, text: Sequence[int], length: int, depths: Sequence[float], prompts: int
) -> tuple[list[float], list[float]]:
    """Return the share of the passkeys and of the needles that are found, per depth; empty without prompts."""
    if not prompts:
        return [], []
    asking = Asking(tokenizer, text, _RETRIEVED, length, prompts * len(depths), depths)
    found = [score.by_depth() for score in asking.ask(model).values()]
    keys, needles = ([parts[depth].accuracy for depth in depths] for parts in found)
    return keys, needles


def check(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    decode: int,
) -> None:
    """Refuse arguments that `evaluate` cannot measure; see there.

    Raises:
        ValueError: If the model is not a causal language model, or an argument is out of range.
    """
    if not model.can_generate():
        raise ValueError(f"`model` must be a causal language model, got {type(model).__name__}. Name another.")
    fresh_cache(model)  # raises if the model has none
    check_lengths(model, lengths, decode)
    if prompts:
        Asking(tokenizer, tokens[0].tolist(), _RETRIEVED, min(lengths), prompts, depths)


def main(args: list[str] | None = None) -> None:
    """Run `sparse-prune evaluate`: measure, write evaluation.md, .json and .png, print the table."""
    parser = _parser()
    given = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with refusals(parser.error):
        model, twin, measure, part = _prepare(given)
        asking = _asking(given, measure)
    pruned, asked = evaluate(model, **measure, chunk=given.chunk), asking.ask(model)
    with nullcontext() if twin is not None else all_connections(model):
        dense = model if twin is None else twin.to(given.device)
        plain, answered = evaluate(dense, **measure, chunk=given.chunk), asking.ask(dense)
    tasks = [TaskResult(name, asking.length, answered[name], asked[name]) for name in asking.names]
    setup = {
        "model": given.model,
        "dense model": given.dense or "the same weights, nothing pruned",
        "text": f"{', '.join(given.text)} ({part})",
        "sequences of the longest length": len(measure["tokens"]),
        "prompts per depth": given.prompts,
        "dtype": str(model.dtype),
        "device": given.device,
        **describe_machine(),
    }
    report = EvaluationReport(setup, sparsity_of(model), tuple(given.depths), plain, pruned, tasks)
    path = report.write(given.output)
    print(f"{report.text()}\nReport: {path}")


def _prepare(given: argparse.Namespace) -> tuple[Any, Any, dict[str, Any], str]:
    """Load and check the pruned model, the dense one or None, the arguments of `evaluate`, and the part of the text."""
    import matplotlib  # noqa: F401 - the report needs it: fail now rather than after the measurement

    options = {"dtype": getattr(torch, given.dtype)} if given.dtype else {}
    model = load(given.model, **options)
    fast = fast_dtype(model.dtype, given.device)
    if fast != model.dtype and not given.dtype:
        model = load(given.model, dtype=fast)
    model.to(given.device)
    twin = load_model(given.dense, model.dtype).eval() if given.dense else None
    tokenizer, lengths = _tokenizer(given.model), given.lengths or lengths_around(model, given.decode)
    told = export_header(given.model).get("held_out")
    tokens, part = held_out(tokenizer, given.text, max(lengths), given.sequences, told)
    measure = {name: getattr(given, name) for name in ("depths", "prompts", "decode")}
    measure |= {"tokenizer": tokenizer, "tokens": tokens, "lengths": lengths}
    for each in (model, twin):
        if each is not None:
            check(each, **measure)
    _check_output(given.output)
    return model, twin, measure, part


def held_out(
    tokenizer: Any, text: str | list[str], length: int, count: int, told: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, str]:
    """Return at most `count` sequences of text that a model was not trained on, and which part of the text they are."""
    documents, part = unseen_documents(text, told)
    return make_sequences(tokenizer, documents, length, count, "to evaluate on", "lengths").input_ids, part


def _asking(given: argparse.Namespace, measure: dict[str, Any]) -> Asking:
    """Make the tasks to ask; raises ValueError if one does not fit."""
    names = list(TASKS) if given.tasks == ["all"] else given.tasks
    length = given.task_length or max(measure["lengths"])
    filler = measure["tokens"][0].tolist() if names else [0]
    return Asking(measure["tokenizer"], filler, names, length, given.questions, given.depths)


def _tokenizer(model: str) -> Any:
    try:
        return load_tokenizer(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` must hold a tokenizer, got none from {model!r}. "
            "Export it with `save_pretrained(..., tokenizer=tokenizer)`."
        ) from error


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`output` must be a folder to write into, got {str(folder)!r}: {error}.") from error


def sparsity_of(model: Any) -> float:
    """Return the share of possible blocks that is pruned, over all layers with a pattern, in [0, 1]."""
    handles = [handle for handle in handles_of(model) if handle.pattern is not None]
    patterns = [handle.pattern for handle in handles if handle.pattern is not None]
    possible = sum(pattern.possible_count for pattern in patterns)
    kept = sum(p.kept_blocks if h.mode != "dense" else p.possible_count for p, h in zip(patterns, handles, strict=True))
    return 1.0 - kept / possible if possible else 0.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-prune evaluate", description=__doc__)
    parser.add_argument("model", help="folder or hub repository that sparse_prune.export wrote")
    parser.add_argument("--dense", help="dense fine-tune to compare with; default: the same weights, nothing pruned")
    parser.add_argument(
        "--text",
        nargs="+",
        default=["stdlib"],
        help="files, folders or globs, read whole; of the training text, stdlib and hub:NAME only the held-out part",
    )
    count = _at_least(1)
    parser.add_argument(
        "--lengths", type=_at_least(2), nargs="+", help="default: 1/2, 1, 2 and 4 times the learned length"
    )
    parser.add_argument("--sequences", type=count, default=2, help="sequences of the longest length for the loss")
    parser.add_argument("--depths", type=_share, nargs="+", default=[0.1, 0.5, 0.9], help="where needles lie, 0 to 1")
    parser.add_argument(
        "--prompts", type=_at_least(0), default=2, help="passkeys and needles per length and depth; 0: none"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        choices=("all", *TASKS),
        metavar="TASK",
        help=f"retrieval tasks to ask as well, or all of them: {', '.join(TASKS)}; default: none. They take "
        "long: both models read a whole context for every question, or for several that share one",
    )
    parser.add_argument("--questions", type=count, default=60, help="questions of each task; fewer than 60 tell little")
    parser.add_argument(
        "--task_length", type=_at_least(2), help="tokens of a task; default: the longest of the lengths"
    )
    parser.add_argument("--decode", type=count, default=32, help="tokens to decode for the speed")
    parser.add_argument("--chunk", type=count, default=1024, help="tokens per forward pass")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: as saved, or float32 if that is faster"
    )
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=user_path, default=Path("runs/evaluate"), help="folder for the report")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return number


def _share(text: str) -> float:
    if not 0.0 <= float(text) <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return float(text)


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # the first two where torch was built without it
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text}: {reason}") from error
    return text
