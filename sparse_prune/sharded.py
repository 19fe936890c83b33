"""Models that FSDP2 shards over several processes, made whole for an export."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: Any) -> bool:
    """Whether parameters are sharded over several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def plain_class(model: Any) -> type[Any]:
    """Return the model's class; `fully_shard` puts one of its own, `FSDP<name>`, before it."""
    kind = type(model)
    return kind.__mro__[kind.__mro__.index(FSDPModule) + 1] if issubclass(kind, FSDPModule) else kind


def whole_weights(model: Any) -> dict[str, Tensor]:
    """Gather a sharded model's state dict in the memory of rank 0's CPU; it is empty on other ranks.

    Every rank must call it. Tied parameters are tied in the state dict, too.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if weights:
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            weights[name] = weights[names.setdefault(id(parameter), name)]
    return weights
