"""Tensors for checkpoints: masks as bits, numbers without their zeros. What is unpacked is equal to the bit."""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

Packed = dict[str, Any]


@overload
def pack(tensor: Tensor) -> Packed: ...
@overload
def pack(tensor: None) -> None: ...
@overload
def pack(tensor: Tensor | None) -> Packed | None: ...
def pack(tensor: Tensor | None) -> Packed | None:
    """The least that a tensor follows from: half the numbers, if the future is masked, and fewer inside a window.

    Args:
        tensor: Boolean or numbers, of any shape; None stays None.

    Returns:
        The shape, a bit per element (uint8, eight elements a byte) that tells whether it is True or not 0, and the
        numbers that are not 0, in order.
    """
    if tensor is None:
        return None
    filled = tensor if tensor.dtype == torch.bool else tensor != 0
    packed: Packed = {"shape": tuple(tensor.shape), "bits": torch.from_numpy(np.packbits(filled.numpy(force=True)))}
    if filled is not tensor:
        packed["values"] = tensor.flatten().index_select(0, filled.flatten().nonzero()[:, 0]).cpu()
    return packed


@overload
def unpack(packed: Packed | Tensor) -> Tensor: ...
@overload
def unpack(packed: Packed | Tensor | None) -> Tensor | None: ...
def unpack(packed: Packed | Tensor | None) -> Tensor | None:
    """The tensor that `pack` took, on the CPU.

    Args:
        packed: What `pack` returned, or a whole tensor, as pruning state of version 2 holds it.
    """
    if packed is None or isinstance(packed, Tensor):
        return packed
    bits = np.unpackbits(packed["bits"].numpy(force=True), count=math.prod(packed["shape"]))
    filled = torch.from_numpy(bits.view(bool))
    if "values" in packed:
        values = packed["values"].cpu()
        filled = torch.zeros(len(filled), dtype=values.dtype).masked_scatter_(filled, values)
    return filled.view(packed["shape"])
