"""The backends, one per module of this folder, and the choice between them."""

from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor

from sparse_prune.kernels.backend import Backend
from sparse_prune.kernels.documents import spanned
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.pattern import BlockPattern

BACKENDS: dict[str, Backend] = {}
"""Name -> backend, by rank. "gather" supports every call on every device."""

for _record in sorted(
    (import_module(f"{__name__}.{module.name}").BACKEND for module in iter_modules(__path__)),
    key=lambda record: (record.rank, record.name),
):
    BACKENDS[_record.name] = _record

_ANYWHERE = "gather"


def check_backend(backend: str) -> Backend:
    """Return the record of a backend by its name.

    Raises:
        ValueError: If no backend has that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {sorted(BACKENDS)}, got {backend!r}.")
    return BACKENDS[backend]


def skipping_backends(device: torch.device) -> tuple[str, ...]:
    """Return the names of the backends that skip pruned blocks on a device, for a measurement to choose from."""
    found = tuple(name for name, backend in BACKENDS.items() if device.type in backend.skips_on)
    return found or (_ANYWHERE,)


def usable_backend(backend: str) -> str:
    """Return a backend's name, or "gather" if this machine cannot run it, such as "triton" without a GPU.

    An unknown name is returned as it is, for `check_backend` to refuse.
    """
    return backend if backend not in BACKENDS or BACKENDS[backend].usable() else _ANYWHERE


def check_trains(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot train on a device.

    Raises:
        ValueError: If it cannot, or there is no backend of that name.
    """
    if not check_backend(backend).trains(device):
        raise ValueError(f"`backend={backend!r}` must train on a CUDA device, got {device}. Use 'auto' or 'gather'.")


def moving_backend(query: Tensor, pattern: BlockPattern, options: AttentionOptions) -> str:
    """Choose the backend for a pattern that still moves: its tables must be cheap to rebuild.

    The choice depends on the call alone, not on a measurement, so that a repeated or resumed run makes the same.

    Args:
        query: (batch, num_heads, q_len, head_dim).
        pattern: The pattern at the lengths of the call.
        options: The call's options.
    """
    pattern = spanned(pattern, options)
    return next((name for name, each in BACKENDS.items() if each.suits_moving(query, pattern, options)), _ANYWHERE)
