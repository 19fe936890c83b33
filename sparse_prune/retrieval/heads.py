"""Retrieval heads: those whose far field the model needs to look things up, found by influence on probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_prune.attention import PrunableAttention
from sparse_prune.attention.modes import evaluating
from sparse_prune.retrieval.probes import RetrievalProbe
from sparse_prune.retrieval.watching import watched
from sparse_prune.scores import FarField


def far_field_influence(
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    handles: Iterable[PrunableAttention],
    probes: Sequence[RetrievalProbe],
    *,
    near: int = 32,
) -> dict[str, Tensor]:
    """How much a model's answers to retrieval probes hang on each head's far field.

    The influence on a probe is the fall of the answers' lead (`RetrievalProbe.lead`) when the head sees no further than
    its sinks and its neighbourhood (`FarField`). Every kind of probe counts alike: its positive influences add up to 1.

    Layers compute with all their connections meanwhile. No parameter's `grad` changes.

    Args:
        model: What is called. It is put into eval mode meanwhile.
        call: Calls it with tokens, int64, (1, length), and returns the logits, (1, length, vocabulary).
        handles: Its layers.
        probes: At least one.
        near: A head's far field lies beyond its first `near` tokens and beyond the `near` to `2 * near` before a query.

    Returns:
        Layer -> float64, (num_heads,), on the CPU. All 0 for layers that no gradient reached.
    """
    layers = list(handles)
    kinds: dict[str, dict[str, Tensor]] = {}
    watching = watched(layers, (near, near), FarField(recent_blocks=2))
    with watching, evaluating(model), _roots(model) as roots, torch.enable_grad():
        for probe in probes:
            lead = probe.lead(call(probe.tokens[None])[0])
            # As far as the first layer needs it, and no weight gets a gradient beside it.
            torch.autograd.grad(-lead, roots, allow_unused=True)
            sums = kinds.setdefault(probe.kind, {layer.name: torch.zeros(layer.num_heads).double() for layer in layers})
            for layer in layers:
                seen, layer.score_sums = layer.score_sums, None
                if seen is not None:
                    sums[layer.name] += seen.sums[0].sum((1, 2)).cpu()
    total = {layer.name: torch.zeros(layer.num_heads).double() for layer in layers}
    for sums in kinds.values():
        positive = sum(float(part.clamp_min(0.0).sum()) for part in sums.values())
        for name, part in sums.items():
            total[name] += part / positive if positive else part
    return total


def strongest_heads(
    influence: Mapping[str, Tensor], share: float, num_kv_heads: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """The heads with the most influence over all layers, as `Constraints.protected_heads` takes them.

    Args:
        influence: As `far_field_influence` returns it.
        share: Of all heads, in [0, 1]. Heads without positive influence are left out.
        num_kv_heads: Layer -> key and value heads: all query heads of one are taken or none, by their sum. None: each
            head for itself.

    Raises:
        ValueError: If `share` is out of range.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`share` must lie in [0, 1], got {share}.")
    units = []
    for name, part in influence.items():
        groups = part.view(len(part) if num_kv_heads is None else num_kv_heads[name], -1)
        size = groups.shape[1]
        units += [
            (-float(value), name, range(unit * size, (unit + 1) * size)) for unit, value in enumerate(groups.mean(1))
        ]
    left, chosen = share * sum(len(part) for part in influence.values()), dict[str, list[int]]()
    for value, name, heads in sorted(units, key=lambda unit: unit[:2]):
        if value >= 0.0 or len(heads) > left + 0.5:
            break
        left -= len(heads)
        chosen.setdefault(name, []).extend(heads)
    return {name: tuple(sorted(heads)) for name, heads in chosen.items()}


@contextmanager
def _roots(model: nn.Module) -> Iterator[list[Tensor]]:
    """What all layers' outputs depend on: the token embedding, which needs gradients meanwhile; else all weights."""
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    if embedding is None:
        yield [weight for weight in model.parameters() if weight.requires_grad]
        return
    needed = embedding.weight.requires_grad
    embedding.weight.requires_grad_(True)
    try:
        yield [embedding.weight]
    finally:
        embedding.weight.requires_grad_(needed)
