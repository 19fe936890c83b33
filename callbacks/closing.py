"""The closing summary of a fit: what was pruned and swapped, where the patterns are, what to do next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparse_prune.prune_report import PruneReport
from sparse_prune.pruner import AttentionPruner
from sparse_prune.retrieval.questions import outcome
from sparse_prune.swap_event import NO_GAIN, NO_GAIN_REMEDY, SwapEvent, measurement
from sparse_prune.words import some


def closing(
    pruner: AttentionPruner,
    report: PruneReport | None,
    events: Sequence[SwapEvent],
    file: Path | None,
    has_report: bool,
    unasked: str | None = None,
) -> str:
    """Return the closing summary, a few lines; `unasked` is the reason if the model could not be asked questions."""
    if report is None:
        return "Pruning: no decision was made, because no optimizer step of the fit ran the attention layers."
    total, layers = pruner.total_sparsity, len(pruner.patterns)
    asked = "" if pruner.sparsity is None else f" ({report.requested:.1%} asked for at the last decision)"
    lines = [f"Pruning: {total:.1%} of the attention of {layers} layers is pruned{asked}."]
    backends = Counter(state.layer.backend for state in pruner.layers.values() if state.layer.mode == "sparse")
    if backends:
        counts = ", ".join(f"{count} on {backend}" for backend, count in backends.most_common())
        lines.append(f"Swapped: {backends.total()} of {layers} layers skip what was pruned: {counts}.")
    reverted = [event for event in events if event.backend == "dense"]
    if reverted:
        lines.append(_reverted(reverted, layers))
    if pruner.open_layers:
        names = [state.layer.name for state in pruner.open_layers]
        lines.append(
            f"Not settled: {len(names)} of {layers} layers ({some(names)}), which mask what was pruned and are no "
            "faster. End the schedule earlier, train longer, or lower `patience` or `every_n_steps`."
        )
    retrieval = outcome(pruner, unasked)
    if retrieval is not None:
        lines.append(retrieval)
    lines.append(_patterns(file, bool(reverted)))
    if file is not None:
        page = f"`sparse-prune report {file.parent}` shows the run on one page; " if has_report else ""
        lines.append(
            f"Next: {page}`sparse_prune.export.save_pretrained(model, folder, pruner=...)` exports a transformers "
            "model, `sparse_prune.attention.apply_patterns` puts the patterns on any model."
        )
    return "\n  ".join(lines)


def _reverted(events: list[SwapEvent], layers: int) -> str:
    event = events[0]
    if event.measured_ms:
        found = measurement(event.layer, event.sparsity, event.tokens, event.measured_ms)
    else:
        found = f"none could be measured on {event.layer}"
    times = [f"{other.layer} {_milliseconds(other)}" for other in events[1:] if other.measured_ms]
    others = f" (dense and best sparse: {some(times)})" if times else ""
    return (
        f"Reverted: {len(events)} of {layers} layers got all their connections back, because {NO_GAIN}: "
        f"{found}{others}. {NO_GAIN_REMEDY}"
    )


def _milliseconds(event: SwapEvent) -> str:
    pair = [f"{ms:.3g}" for ms in (event.dense_ms, event.sparse_ms) if ms is not None]
    return f"{' and '.join(pair)} ms"


def _patterns(file: Path | None, reverted: bool) -> str:
    if file is None:
        return "Patterns: not written to a file."
    unused = (
        "; it also holds the patterns of reverted layers, marked as unused (`load_patterns(path, unused=True)` loads "
        "them on a machine where they are faster)"
    )
    return f"Patterns: {file}{unused if reverted else ''}."
