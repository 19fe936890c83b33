"""The two packages that hold Lightning, `pytorch_lightning` and `lightning.pytorch`: what works must work with both.

They hold the same code, and neither knows the other's classes. So our callbacks inherit from both, and a question about
a class is asked of both. No other file of the callbacks tells them apart.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

PACKAGES: tuple[str, ...] = ("pytorch_lightning", "lightning.pytorch")
"""Those that are installed."""
try:
    import_module(PACKAGES[-1])
except ImportError:  # it is optional
    PACKAGES = PACKAGES[:1]


def _find(package: str, name: str) -> Any:
    module, _, attribute = f"{package}.{name}".rpartition(".")
    return getattr(import_module(module), attribute)


def classes(name: str) -> tuple[type[Any], ...]:
    """A class of Lightning in every package that is installed, for `isinstance`.

    Args:
        name: Such as "loggers.CSVLogger".
    """
    return tuple(_find(package, name) for package in PACKAGES)


def logger_bases() -> tuple[type[Any], ...]:
    """What a logger of pytorch_lightning must inherit from as well to be one of the other package."""
    return classes("loggers.Logger")[1:]


if TYPE_CHECKING:
    Callback = pl.Callback
else:
    Callback = type("Callback", classes("callbacks.Callback"), {"__module__": __name__})


def overrides(pl_module: pl.LightningModule, hook: str) -> bool:
    """Whether a module has a hook of its own.

    Args:
        pl_module: Of either package.
        hook: Name of the hook.
    """
    return bool(
        _find(_package(pl_module, "core.LightningModule"), "utilities.model_helpers.is_overridden")(hook, pl_module)
    )


def tell(trainer: pl.Trainer, message: str) -> None:
    """Say something on rank 0 where Lightning's own notes go: users see it without raising a log level.

    Args:
        trainer: Of either package; its package's logger takes the message.
        message: What to say.
    """
    _find(_package(trainer, "trainer.Trainer"), "utilities.rank_zero.rank_zero_info")(message)


def _package(thing: object, name: str) -> str:
    """The package whose class of that name `thing` is of."""
    return next((package for package in PACKAGES if isinstance(thing, _find(package, name))), PACKAGES[0])
