"""Support for both packages of Lightning, `pytorch_lightning` and `lightning.pytorch`.

They hold the same code in different classes. So our callbacks inherit from both, and `isinstance` tests both. No other
file of the callbacks distinguishes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

PACKAGES: tuple[str, ...] = ("pytorch_lightning", "lightning.pytorch")
"""The installed ones."""
try:
    import_module(PACKAGES[-1])
except ImportError:  # it is optional
    PACKAGES = PACKAGES[:1]


def _find(package: str, name: str) -> Any:
    module, _, attribute = f"{package}.{name}".rpartition(".")
    return getattr(import_module(module), attribute)


def classes(name: str) -> tuple[type[Any], ...]:
    """Return a Lightning class of each installed package, for `isinstance`.

    Args:
        name: Its name in a package, such as "loggers.CSVLogger".
    """
    return tuple(_find(package, name) for package in PACKAGES)


def logger_bases() -> tuple[type[Any], ...]:
    """Return the base classes that make a logger of pytorch_lightning one of the other package too."""
    return classes("loggers.Logger")[1:]


if TYPE_CHECKING:
    Callback = pl.Callback
else:
    Callback = type("Callback", classes("callbacks.Callback"), {"__module__": __name__})


def overrides(pl_module: pl.LightningModule, hook: str) -> bool:
    """Whether a module overrides a hook."""
    return bool(
        _find(_package(pl_module, "core.LightningModule"), "utilities.model_helpers.is_overridden")(hook, pl_module)
    )


def tell(trainer: pl.Trainer, message: str) -> None:
    """Log a message on rank 0 through Lightning's own logger, which users see at its default level."""
    _find(_package(trainer, "trainer.Trainer"), "utilities.rank_zero.rank_zero_info")(message)


def _package(thing: object, name: str) -> str:
    """Return the package in which `thing` is an instance of the class of that name."""
    return next((package for package in PACKAGES if isinstance(thing, _find(package, name))), PACKAGES[0])
