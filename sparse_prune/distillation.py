"""Distillation: the model with all its connections teaches the same model with pruned ones.

Self-distillation needs no second model in memory. DMS trains KV eviction on the logits of the dense model in the same
way (arXiv:2506.05345); there the teacher has the original weights, here it has the student's current ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_prune.attention import PrunableAttention
from sparse_prune.attention.modes import evaluating, unpruned


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of the distillation from the dense model.

    Raises:
        ValueError: If a number is not positive.
    """

    weight: float = 1.0
    """Factor on the divergence when it is added to the loss."""
    temperature: float = 1.0
    """Divides the logits of both; the divergence is multiplied by its square (arXiv:1503.02531)."""
    after_ramp: bool = False
    """Whether to go on after all layers have settled. Every step then costs a dense forward pass more."""
    module: str | None = None
    """Qualified name, in the LightningModule, of the module whose output is the logits or has an attribute `logits`.
    None: the child that holds all attention layers."""

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence of the student's distribution from the teacher's, in nats, averaged over positions.

    Args:
        student: Logits, (..., classes).
        teacher: Logits, (..., classes).
        temperature: Divides both; the result is multiplied by its square.
        mask: (...), zero where a position does not count.
    """
    found = (student.float() / temperature).log_softmax(-1)
    wanted = (teacher.float() / temperature).log_softmax(-1)
    per_position = F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1) * temperature**2
    if mask is None:
        return per_position.mean()
    weights = mask.to(per_position.dtype)
    return (per_position * weights).sum() / weights.sum().clamp_min(1.0)


class DenseTeacher:
    """Records the calls of a model and repeats them with all connections.

    Args:
        module: Its output is the logits, or has an attribute `logits`. A keyword argument `attention_mask` of the
            logits' shape without classes tells which positions count.
        handles: The model's attention layers.
        temperature: See `divergence`.
    """

    def __init__(self, module: nn.Module, handles: Iterable[PrunableAttention], temperature: float = 1.0) -> None:
        self.module, self.handles, self.temperature = module, list(handles), temperature
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the calls of the module inside the block, for `loss`."""
        self._calls = []
        hook = self.module.register_forward_hook(self._record, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self._calls.append((args, kwargs, logits_of(output)))

    def loss(self) -> Tensor | None:
        """Return the mean divergence over the recorded calls and drop them; None if there were none."""
        calls, self._calls = self._calls, []
        found = []
        for args, kwargs, student in calls:
            with torch.no_grad(), unpruned(self.handles), evaluating(self.module):
                teacher = logits_of(self.module(*args, **kwargs))
            mask = kwargs.get("attention_mask")
            fits = isinstance(mask, Tensor) and mask.shape == student.shape[:-1]
            found.append(divergence(student, teacher, self.temperature, mask if fits else None))
        return torch.stack(found).mean() if found else None


def logits_of(output: Any) -> Tensor:
    """Return the logits of a module's output: the output itself, or its attribute `logits`.

    Raises:
        ValueError: If it has none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "`module` must name a module whose output is a tensor of logits or has `logits`, got "
            f"{type(output).__name__}. Name the module that ends with the logits."
        )
    return logits
