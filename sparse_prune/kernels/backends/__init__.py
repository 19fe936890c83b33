"""The backends: every module of this folder holds one, as `BACKEND`."""

from importlib import import_module
from pkgutil import iter_modules

from sparse_prune.kernels.backend import Backend

BACKENDS: dict[str, Backend] = {}
"""Name -> backend, by rank. "gather" takes every call on every device."""

for _record in sorted(
    (import_module(f"{__name__}.{module.name}").BACKEND for module in iter_modules(__path__)),
    key=lambda record: (record.rank, record.name),
):
    BACKENDS[_record.name] = _record

__all__ = ["BACKENDS"]
