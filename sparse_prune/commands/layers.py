"""`sparse-prune layers`: lists the attention layers of a model, and why some cannot be pruned."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_prune.attention import FoundLayer, list_layers
from sparse_prune.refusals import refusals

_KINDS = "a hub id or a folder of a transformers model, timm:NAME, or package.module:factory, a callable"
COLUMNS = ("layer", "kind", "heads", "kv heads", "causal", "window", "cannot be pruned because")


def main(args: list[str] | None = None) -> None:
    """Run `sparse-prune layers MODEL`. The exit code is 1 if no layer can be pruned."""
    parser = argparse.ArgumentParser(
        prog="sparse-prune layers", description="Attention layers of a model, and why some cannot be pruned."
    )
    parser.add_argument("model", help=_KINDS)
    given = parser.parse_args(args)
    with refusals(parser.error):
        model, example = build(given.model)
        layers = list_layers(model, example)
    print(table(layers))
    usable = sum(layer.problem is None for layer in layers)
    print(f"{usable} of {len(layers)} attention layers of {type(model).__name__} can be pruned.")
    if not usable:
        sys.exit(1)


def build(name: str) -> tuple[nn.Module, Any]:
    """Build a model without its trained weights, and an example input if one is known.

    Raises:
        ImportError: If a package is missing.
        ValueError: If there is no such callable, or it returns no module.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        import timm

        model = timm.create_model(rest, pretrained=False)
        return model, torch.zeros(1, *model.pretrained_cfg["input_size"])
    if rest and not Path(name).exists():
        return _made(kind, rest), None
    return _transformers(name), None


def table(layers: list[FoundLayer]) -> str:
    """Format the layers in columns, a line per layer."""
    rows = [COLUMNS, *(_cells(layer) for layer in layers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cells(layer: FoundLayer) -> tuple[str, ...]:
    values = (layer.num_heads, layer.num_kv_heads, layer.causal, layer.window)
    known = ("yes" if value is True else "no" if value is False else str(value or "-") for value in values)
    return (layer.name or "(the model)", layer.kind, *known, layer.problem or "")


def _made(module: str, attribute: str) -> nn.Module:
    sys.path.insert(0, "")  # as `python -m` does: modules of the current folder
    factory = getattr(import_module(module), attribute, None)
    if not callable(factory):
        raise ValueError(f"MODEL must name a callable, got {module}:{attribute}, which is {factory!r}.")
    try:
        model = factory()
    except TypeError as error:
        raise ValueError(f"{module}:{attribute} must be callable without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{attribute} must return an nn.Module, got {type(model).__name__}. Name another.")
    return model


def _transformers(name: str) -> nn.Module:
    """Make a model from its configuration, on the meta device."""
    import transformers

    folder = Path(name).expanduser()
    is_path = folder.is_absolute() or name.startswith(".") or folder.exists()
    if is_path and not (folder / "config.json").is_file():
        raise ValueError(f"MODEL must be {_KINDS}, got {name!r}, where there is no config.json.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder if folder.exists() else name)
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL must be {_KINDS}, got {name!r}: {error}") from error
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return model
