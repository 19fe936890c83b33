"""The model card of an export: what was pruned from what, what it cost, and how to load it, as README.md."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_prune.export.patterns import PATTERN_FILE, read_pattern_file
from sparse_prune.files import whole_file
from sparse_prune.pattern import BlockPattern
from sparse_prune.pictures import LEGEND, framed_atlas, views
from sparse_prune.reports import table

log = logging.getLogger(__name__)

CARD = "README.md"
PICTURE = "attention_pattern.png"
_MARK = "<!-- written by sparse_prune, which replaces it if nothing below was changed: {} -->"


def update_card(folder: str | os.PathLike[str], evaluation: str | os.PathLike[str]) -> None:
    """Put the results of an evaluation into an export's model card. A card that somebody wrote or edited stays.

    Args:
        folder: A folder that `save_pretrained` wrote.
        evaluation: A folder that `sparse-prune evaluate` wrote.

    Raises:
        FileNotFoundError: If `folder` holds no export.
        ValueError: If `evaluation` holds no evaluation.
    """
    target = Path(folder).expanduser()
    if is_own(target / CARD):
        write_card(target, evaluation)
    else:
        tell_of_card(target)


def write_card(folder: Path, evaluation: str | os.PathLike[str] | None = None) -> None:
    """Write README.md and its picture into an export, whatever is there; arguments and errors as in `update_card`."""
    from huggingface_hub import ModelCardData

    patterns, header = read_pattern_file(folder / PATTERN_FILE)
    base_model = header.get("base_model")
    known = base_model if base_model and base_model.count("/") == 1 and ":" not in base_model else None
    report = {} if evaluation is None else _evaluation(Path(evaluation))
    results = _results(report)
    told: dict[str, Any] = {"tags": ["sparse_prune", "sparse-attention"], "library_name": "transformers"}
    told |= {} if known is None else {"base_model": known, "base_model_relation": "finetune"}
    told |= {"model_name": header["model"]["class"], "eval_results": results} if results else {}
    parts = [
        f"# {header['model']['class']}, {header['sparsity']:.0%} of its attention pruned",
        _facts(header, patterns),
        f"![Which blocks each head keeps]({PICTURE})\n\n{LEGEND}" if _draw(patterns, folder / PICTURE) else "",
        _table(report)
        if report
        else "## Evaluation\n\nNothing was measured: `sparse-prune evaluate` does, and the "
        "export takes what it wrote (`evaluation=`).",
        _loading(header["model"]["class"], all(pattern.causal for pattern in patterns.values())),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    with whole_file(folder / CARD) as path:
        path.write_text(f"---\n{ModelCardData(**told).to_yaml()}\n---\n{_MARK.format(_digest(text))}\n{text}", "utf-8")


def tell_of_card(where: object) -> None:
    """Say that a card is left as it is."""
    log.warning(
        "%s has a %s that sparse_prune did not write, or that was edited. It stays; remove it to get a new one.",
        where,
        CARD,
    )


def is_own(card: Path) -> bool:
    """Whether `write_card` wrote a README.md whose text nobody has changed, or there is none."""
    if not card.is_file():
        return not os.path.lexists(card)
    _, found, after = card.read_text("utf-8", errors="replace").partition(_MARK.partition("{}")[0])
    digest, _, text = after.partition(" -->\n")
    return bool(found) and digest == _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _facts(header: Mapping[str, Any], patterns: Mapping[str, BlockPattern]) -> str:
    densest, *_, sparsest = sorted([*patterns, *patterns], key=lambda name: patterns[name].sparsity)
    block = " x ".join(map(str, patterns[sparsest].block_size))
    ends = (f"{patterns[name].sparsity:.1%} ({name})" for name in (densest, sparsest))
    length = max(pattern.kv_len for pattern in patterns.values())
    rows = {
        "base model": header.get("base_model") or "not recorded",
        "data": header.get("data") or "not recorded",
        "pruned": f"{header['sparsity']:.1%} of the possible blocks ({block} tokens) of {len(patterns)} layers",
        "least and most": ", ".join(ends),
        "pruned at": f"{length} tokens; longer texts follow the rule: {header['rule']}",
    }
    if "schedule" in header:
        schedule = header["schedule"]
        rows["schedule"] = f"{schedule['kind']} of {schedule['of']}, final {schedule.get('final', '?')}"
    rows["written by"] = header["library"]
    return table(("", ""), rows.items())


def _draw(patterns: Mapping[str, BlockPattern], path: Path) -> bool:
    try:
        from PIL import Image
    except ImportError:
        log.info("The model card has no picture, for which Pillow is needed. Install it and export again.")
        return False
    with whole_file(path) as file:
        Image.fromarray(framed_atlas(views(patterns))).save(file, format="PNG")
    return True


def _evaluation(folder: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text("utf-8"))
        return {key: report[key] for key in ("setup", "dense", "pruned", "tasks")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`evaluation` must be a folder that `sparse-prune evaluate` wrote, got {os.fspath(folder)!r}: {error!r}. "
            "Evaluate the export first."
        ) from error


def _table(report: Mapping[str, Any]) -> str:
    """Show dense beside pruned, with the 95 % intervals of the retrieval tasks."""
    rows: list[tuple[object, ...]] = []
    for dense, pruned in zip(report["dense"], report["pruned"], strict=True):
        length, one, other = dense["length"], dense["cost"], pruned["cost"]
        rows += [
            ("loss, nats per token", length, *(f"{loss:.4f}" for loss in (dense["loss"], pruned["loss"]))),
            ("KV cache, MiB", length, *(f"{cost['kv_bytes'] / 2**20:.2f}" for cost in (one, other))),
            ("decoding, tokens per second", length, *(f"{c['decode_tokens_per_s']:.1f}" for c in (one, other))),
        ]
    for task in report["tasks"]:
        name = f"{task['task']}, right (95 % interval)"
        rows.append((name, task["length"], _right(task["dense"]), _right(task["pruned"])))
    setup = ", ".join(
        f"{key}: {report['setup'][key]}" for key in ("text", "dtype", "machine") if key in report["setup"]
    )
    measured = table(("measured", "tokens:", "dense:", "pruned:"), rows)
    return f"## Evaluation\n\n{measured}\n\nMeasured by `sparse-prune evaluate` ({setup})."


def _right(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.0%} ({low:.0%} to {high:.0%})"


def _results(report: Mapping[str, Any]) -> list[Any]:
    """Describe the results of the pruned model, which the hub shows beside the card."""
    from huggingface_hub import EvalResult

    if not report:
        return []
    text = {"task_type": "text-generation", "dataset_type": "text"}
    name = str(report["setup"].get("text", "text"))
    measured = [(name, part["length"], "loss", part["loss"]) for part in report["pruned"]]
    measured += [(t["task"], t["length"], "accuracy", t["pruned"]["accuracy"]) for t in report["tasks"]]
    return [
        EvalResult(**text, dataset_name=f"{of}, {length} tokens", metric_type=kind, metric_value=value)
        for of, length, kind, value in measured
    ]


def _loading(kind: str, causal: bool) -> str:
    cache = "from sparse_prune.cache import PatternCache\n" if causal else ""
    call = "model.generate(**inputs, past_key_values=PatternCache(model))" if causal else "model(**inputs)"
    return f"""## How to load it

With its patterns, which skip what was pruned:

```py
{cache}from sparse_prune.export import load

model = load("this folder, or owner/name")
{call}
```

Without sparse_prune, as a model that attends to all that its configuration allows, and so is the pruned one only if
windows in the configuration (`layer_types`, `sliding_window`) say all that its patterns say:

```py
from transformers import {kind}

model = {kind}.from_pretrained("this folder, or owner/name")
```

With its patterns and without sparse_prune: `attn_implementation="owner/name"` of a repository that
`sparse_prune.export.save_kernels` wrote, and the `kernels` package."""
