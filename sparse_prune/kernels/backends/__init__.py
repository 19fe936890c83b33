"""The backends, one in every module of this folder, and which of them serves a call."""

from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.documents import spanned
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

BACKENDS: dict[str, Backend] = {}
"""Name -> backend, by rank. "gather" takes every call on every device."""

for _record in sorted(
    (import_module(f"{__name__}.{module.name}").BACKEND for module in iter_modules(__path__)),
    key=lambda record: (record.rank, record.name),
):
    BACKENDS[_record.name] = _record

_ANYWHERE = "gather"


def check_backend(backend: str) -> Backend:
    """The record of a backend.

    Args:
        backend: A name.

    Raises:
        ValueError: If no backend has that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {sorted(BACKENDS)}, got {backend!r}.")
    return BACKENDS[backend]


def skipping_backends(device: torch.device) -> tuple[str, ...]:
    """Backends that skip pruned blocks on a device, for a measurement to choose from.

    Args:
        device: Where the layer runs.
    """
    found = tuple(name for name, backend in BACKENDS.items() if device.type in backend.skips_on)
    return found or (_ANYWHERE,)


def usable_backend(backend: str) -> str:
    """The backend itself, or "gather" in the place of one that this machine does not run, as "triton" without a GPU.

    Args:
        backend: A name; one that is no backend is given back as it is, for `check_backend` to refuse.
    """
    return backend if backend not in BACKENDS or BACKENDS[backend].usable() else _ANYWHERE


def check_trains(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot train on a device.

    Args:
        backend: One of `BACKENDS`.
        device: Where the layers run.

    Raises:
        ValueError: If it cannot, or there is no such backend.
    """
    if not check_backend(backend).trains(device):
        raise ValueError(f"`backend={backend!r}` must train on a CUDA device, got {device}. Use 'auto' or 'gather'.")


def moving_backend(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> str:
    """The backend for a pattern that still moves: its tables must be cheap to rebuild.

    It follows from the call alone, no clock is asked: a run that is repeated or resumed takes the same.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        pattern: For the lengths of the call.
        options: Of the call.
    """
    pattern = spanned(pattern, options)
    return next((name for name, each in BACKENDS.items() if each.suits_moving(query, pattern, options)), _ANYWHERE)
