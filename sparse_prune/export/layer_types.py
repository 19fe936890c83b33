"""Patterns that are the same for all heads of a layer, as sliding windows in the model's own configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparse_prune.attention import PrunableAttention, apply_patterns, attach
from sparse_prune.export.heads import Reach, reaches
from sparse_prune.export.loadable import empty_twin, loadable
from sparse_prune.pattern import BlockPattern

_WINDOW, _FULL = "sliding_attention", "full_attention"
_REMEDY = 'Prune with Constraints(far_field="layer", sink_blocks=0).'


def with_layer_types(model: Any) -> Any:
    """Make a model whose configuration says what its patterns say, by `layer_types` and `sliding_window`.

    What its `save_pretrained` writes then computes the same in plain transformers, and in every program that honours
    the two, without this library. A window of n blocks becomes one of as many tokens, counted from each query: queries
    see all that they saw, and those before their block's end see up to a block less a token more. So measure the new
    model, or train it further. Its patterns cover the windows, for the sparse kernels.

    Args:
        model: A transformers model with patterns, whose layers see everything or a window, of one width, without sinks.

    Returns:
        A new model of the class, with the same parameters, in the mode (training or not) of the first.

    Raises:
        ValueError: If a layer sees neither everything nor such a window, if windows differ, or if the architecture does
            not honour the two settings. The message names the layer.
    """
    model = loadable(model)
    layers = attach(model)
    windows = [_window(layer) for layer in layers]
    window = _one(layers, windows)
    twin = _rebuilt(model, _changes(model, layers, windows, window))
    patterns = {layer.name: _covering(layer, tokens) for layer, tokens in zip(layers, windows, strict=True) if tokens}
    _check_same(model, twin, window)
    apply_patterns(twin, patterns)
    return twin.train(model.training)


def _window(layer: PrunableAttention) -> int | None:
    """Return the tokens of a layer's window; None if attention is full."""
    if layer.pattern is None or layer.mode == "dense":
        return None
    heads = reaches(layer.pattern, layer.name)
    for head, reach in enumerate(heads):
        if reach != heads[0]:
            raise ValueError(
                f"All heads of layer {layer.name!r} must see the same, got {_words(reach)} for head {head} and "
                f"{_words(heads[0])} for head 0. {_REMEDY}"
            )
    if heads[0] is not None and heads[0].sink:
        raise ValueError(
            f"Layer {layer.name!r} must be a window without sinks, which no `sliding_window` has, got {heads[0]}. "
            f"{_REMEDY}"
        )
    return None if heads[0] is None else heads[0].recent


def _words(reach: Reach | None) -> str:
    return "everything" if reach is None else repr(reach)


def _one(layers: list[PrunableAttention], windows: list[int | None]) -> int:
    """Return the width of all windows."""
    found = {tokens: layer.name for layer, tokens in zip(layers, windows, strict=True) if tokens is not None}
    if len(found) != 1:
        raise ValueError(f"`model` must have windows of one width, got {found or 'full layers alone'}. {_REMEDY}")
    return next(iter(found))


def _changes(model: Any, layers: list[PrunableAttention], windows: list[int | None], window: int) -> dict[str, Any]:
    """Return the changes of the configuration."""
    config, declared = model.config, vars(model.config)
    if len(layers) != getattr(config, "num_hidden_layers", None) or "sliding_window" not in declared:
        raise ValueError(
            f"The configuration of {type(model).__name__} must have a `sliding_window` and a layer for each pattern, "
            f"which {type(config).__name__} has not. Export it with `save_pretrained` and load it with `load`."
        )
    before = declared.get("layer_types")
    if before is None and None in windows:
        raise ValueError(
            f"{type(config).__name__} has no `layer_types`: all layers must be windows, got a full layer "
            f"{layers[windows.index(None)].name!r}. Protect no layer, or export it with `save_pretrained`."
        )
    changes: dict[str, Any] = {"sliding_window": window}
    if "use_sliding_window" in declared:
        changes["use_sliding_window"] = True
    if before is not None:
        changes["layer_types"] = [
            kind if tokens is None else _WINDOW for kind, tokens in zip(before, windows, strict=True)
        ]
        for layer, tokens, kind in zip(layers, windows, before, strict=True):
            if tokens is None and kind != _FULL and config.sliding_window != window:
                raise ValueError(
                    f"Layer {layer.name!r} must keep its own {kind} of {config.sliding_window} tokens, while others "
                    f"have windows of {window}: {type(config).__name__} has one width for all. "
                    f"Prune with recent_blocks that make {config.sliding_window} tokens."
                )
    return changes


def _rebuilt(model: Any, changes: dict[str, Any]) -> Any:
    """Make a model of another configuration with the same parameters and buffers."""
    twin = empty_twin(model, changes)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    twin.tie_weights()
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, buffer)
    twin.generation_config = model.generation_config
    return twin


def _covering(layer: PrunableAttention, tokens: int) -> BlockPattern:
    """Mark the window's blocks and those that it reaches into."""
    pattern = layer.pattern
    assert pattern is not None
    row, col = torch.arange(pattern.keep.shape[1])[:, None], torch.arange(pattern.keep.shape[2])
    return replace(pattern, keep=(row - col <= tokens // pattern.block_size[1]).expand_as(pattern.keep).clone())


@torch.no_grad()
def _check_same(model: Any, twin: Any, window: int) -> None:
    """Refuse an architecture in which more than the window depends on a layer's type, or that ignores it.

    Tokens within the window must come out alike.
    """
    training, device = model.training, next(model.parameters()).device
    ids = torch.arange(min(window, 16), device=device)[None]
    model.eval()
    twin.eval()
    known = not any(buffer.is_meta for buffer in twin.buffers())
    one = model(ids, use_cache=False).logits
    model.train(training)
    same = known and torch.allclose(
        one, twin(ids, use_cache=False).logits, rtol=1e-3, atol=1e-3 * float(one.abs().max())
    )
    if not same:
        raise ValueError(
            f"{type(model.config).__name__} makes more than the window depend on `layer_types` (its rotary embedding, "
            "say): full layers cannot become windows. Export the model with `save_pretrained` and load it with `load`."
        )
    wrong = [name for name, module in twin.named_modules() if _ignores(module, window)]
    if wrong:
        raise ValueError(
            f"{type(model).__name__} must honour `layer_types`, got another window in layer {wrong[0]!r}. "
            "Export the model with `save_pretrained` and load it with `load`."
        )


def _ignores(module: Any, window: int) -> bool:
    """Whether an attention layer that knows of windows has another one than its type says."""
    kind, own = getattr(module, "layer_type", None), getattr(module, "sliding_window", "unknown")
    return kind == _WINDOW and own not in (window, "unknown")
