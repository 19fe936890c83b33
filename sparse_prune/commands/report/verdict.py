"""Judges what pruning won and lost, from the logs: a sentence and three figures."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparse_prune import metrics
from sparse_prune.commands.report.logs import RunLogs, Series
from sparse_prune.losses import find_loss, loss_keys
from sparse_prune.words import duration, factor

Judgement = Literal["good", "fair", "bad", "unknown"]
LIMITS = {"speed": (1.05, 0.95), "loss": (0.01, 0.05), "retrieval": (0.95, 0.8)}
"""Where good ends and where bad begins: factor of speed, relative rise of the loss, share of the twin's answers."""
LIMITS_TOLD = (
    "The dense twin is the same fine-tune without pruning. "
    "Green: at least 5% faster, at most 1% more loss, at least 95% of the dense twin's answers. "
    "Red: more than 5% slower, more than 5% more loss, under 80% of the answers. Amber: between. Grey: no comparison."
)
FEW_PROMPTS = 20
"""With fewer prompts, a single answer changes the judgement."""
_RETRIEVAL = re.compile(r"passkey|needle|retriev|recall")
_HELD_OUT = re.compile(r"(?:test|val|valid|validation)[/_](.+?)(?:_epoch|_step)?")


@dataclass(frozen=True)
class Figure:
    """One judged number."""

    label: str
    value: str
    note: str
    """What it was compared with."""
    judgement: Judgement
    clause: str
    """The figure as a clause of the sentence; empty if nothing was compared."""


@dataclass(frozen=True)
class Numbers:
    """A run in numbers; None: the number was not logged."""

    finished: bool
    step: int
    """Last step that was logged."""
    sparsity: float | None
    loss: float | None
    dense_loss: float | None
    loss_key: str | None
    seconds: float | None
    """Median seconds of the steps after the last swap; of all steps if no layer was swapped."""
    dense_seconds: float | None
    """Median seconds of the dense twin's steps but the first."""
    swapped: bool
    quality: float | None
    dense_quality: float | None
    quality_name: str
    """Name of the quality without its stage, such as passkey accuracy."""
    prompts: float
    """Number of prompts that retrieval was measured with; infinite if the settings do not tell."""


def numbers(logs: RunLogs) -> Numbers:
    """Read the numbers of a run from its logs."""
    loss = next((key for stage in ("test", "validation", "training") if (key := find_loss(stage, logs.metrics))), None)
    quality = _quality(logs.metrics)
    prompts = logs.settings.get("passkey_prompts", "") if quality and "passkey" in quality else ""
    swaps = swap_steps(logs)
    own = logs.metrics.get(metrics.STEP_SECONDS.key, [])
    after = [seconds for step, seconds in own if not swaps or step > swaps[-1]]
    twin = [seconds for _, seconds in logs.dense.get(metrics.STEP_SECONDS.key, [])][1:]
    return Numbers(
        finished="final/sparsity" in logs.metrics,
        step=span(logs)[1],
        sparsity=last(metrics.SPARSITY.key, logs.metrics),
        loss=last(loss, logs.metrics),
        dense_loss=last(loss, logs.dense),
        loss_key=loss,
        seconds=statistics.median(after) if after else None,
        dense_seconds=statistics.median(twin) if twin else None,
        swapped=bool(swaps),
        quality=last(quality, logs.metrics),
        dense_quality=last(quality, logs.dense),
        quality_name=_HELD_OUT.fullmatch(quality)[1].replace("_", " ") if quality else "",  # type: ignore[index]
        prompts=int(prompts) if prompts.isdecimal() else math.inf,
    )


def last(key: str | None, of: Mapping[str, Series]) -> float | None:
    """Return the last value of a key; None if it was not logged."""
    return of[key][-1][1] if key is not None and key in of else None


def span(logs: RunLogs) -> tuple[int, int]:
    """Return the first and last step of the run's curves: metrics of pruning, training and validation losses."""
    keys = [key for metric in metrics.METRICS for key in metric.keys(logs.metrics)]
    keys += [key for stage in ("training", "validation") if (key := find_loss(stage, logs.metrics))]
    steps = [step for key in keys for step, _ in (logs.metrics[key][0], logs.metrics[key][-1])]
    return min(steps, default=0), max(steps, default=0)


def swap_steps(logs: RunLogs) -> list[int]:
    """Return the steps at which layers were swapped, ascending."""
    return sorted({step for key in metrics.LAYER_SWAP.keys(logs.metrics) for step, _ in logs.metrics[key]})


def sentence(found: Numbers, planned: str | None) -> str:
    """Tell the run in a sentence."""
    begin = "" if found.finished else f"Unfinished, step {found.step}{f' of {planned}' if planned else ''}: "
    if found.sparsity is None:
        return f"{begin}nothing was pruned yet."
    clauses = [figure.clause for figure in figures(found) if figure.clause]
    told = ", ".join(clauses[:-1]) + " and " * (len(clauses) > 1) + "".join(clauses[-1:])
    pruned = f"{begin}{found.sparsity:.1%} of the attention blocks are pruned"
    return f"{pruned}; {told}." if told else f"{pruned}; nothing was compared with a dense twin."


def figures(found: Numbers) -> list[Figure]:
    """Judge speed, loss and retrieval."""
    return [_speed(found), _loss(found), _kept(found)]


def _speed(found: Numbers) -> Figure:
    own, dense = found.seconds, found.dense_seconds
    if own is None:
        return Figure("Step time", "not logged", "", "unknown", "")
    if dense is None:
        return Figure("Step time", duration(own), "no dense twin was timed", "unknown", "")
    note = f"{duration(own)} a step against {duration(dense)} of the dense twin"
    if not found.swapped:
        return Figure("Step time", "not swapped yet", note, "unknown", "no layer skips what was pruned yet")
    gain = dense / own
    value = factor(gain, "faster", "slower")
    clause = f"a step is {value} than the dense twin's"
    return Figure("Step time", value, note, _judge(gain, *LIMITS["speed"]), clause)


def _loss(found: Numbers) -> Figure:
    if found.loss is None:
        return Figure("Loss", "not logged", "", "unknown", "")
    training = found.loss_key in loss_keys("training")
    name = "training loss" if training else "held-out loss"
    if found.dense_loss is None:
        return Figure(name.capitalize(), f"{found.loss:.4f}", f"{found.loss_key}, no dense twin", "unknown", "")
    change = found.loss / found.dense_loss - 1.0
    note = f"{found.loss_key}, {found.loss:.4f} against {found.dense_loss:.4f} of the dense twin"
    clause = f"the {name} is {abs(change):.2%} {'higher' if change > 0 else 'lower'}"
    return Figure(name.capitalize(), f"{change:+.2%}", note, _judge(-change, *(-x for x in LIMITS["loss"])), clause)


def _kept(found: Numbers) -> Figure:
    if found.quality is None:
        note = "no accuracy was logged: `sparse-prune evaluate --tasks` asks an export"
        return Figure("Retrieval", "not measured", note, "unknown", "")
    label = f"{found.quality_name.capitalize()} kept"
    if found.dense_quality is None:
        return Figure(found.quality_name.capitalize(), f"{found.quality:.1%}", "no dense twin", "unknown", "")
    few = f"; {found.prompts} prompts, too few to tell more" if found.prompts < FEW_PROMPTS else ""
    note = f"{found.quality:.1%} against {found.dense_quality:.1%} of the dense twin{few}"
    if not found.dense_quality:
        return Figure(label, "none to keep", note, "unknown", "")
    share = found.quality / found.dense_quality
    clause = f"{share:.0%} of the twin's {found.quality_name} is kept"
    return Figure(label, f"{share:.0%}", note, _judge(share, *LIMITS["retrieval"]), clause)


def _judge(value: float, good: float, bad: float) -> Judgement:
    return "good" if value >= good else "bad" if value < bad else "fair"


def _quality(logged: Mapping[str, Series]) -> str | None:
    """Find the key of the most telling held-out share: retrieval before any accuracy."""
    losses = {*loss_keys("test"), *loss_keys("validation")}
    names = [key for key in sorted(logged) if _HELD_OUT.fullmatch(key) and key not in losses]
    found = [key for key in names if _RETRIEVAL.search(key)] or [key for key in names if "acc" in key]
    return found[0] if found else None
