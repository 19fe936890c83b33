"""The Trainer of the recipes, which can choose its precision by the machine."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT

from sparse_prune.precision import fast_precision


class RecipeTrainer(pl.Trainer):
    """A Trainer that takes `precision="auto"`: "bf16-mixed" if the machine multiplies bfloat16 fast, or else "32-true".

    Args:
        *args: As for `pytorch_lightning.Trainer`.
        accelerator: As for `pytorch_lightning.Trainer`; for `precision="auto"`, "auto" means the GPU if there is one.
        precision: As for `pytorch_lightning.Trainer`, or "auto".
        **kwargs: As for `pytorch_lightning.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        accelerator: str | pl.accelerators.Accelerator = "auto",
        precision: _PRECISION_INPUT | Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> None:
        if precision == "auto":
            precision = fast_precision(_device(accelerator))
        super().__init__(*args, accelerator=accelerator, precision=precision, **kwargs)


def _device(accelerator: str | pl.accelerators.Accelerator) -> str:
    on_gpu = accelerator in ("auto", "gpu", "cuda") or isinstance(accelerator, pl.accelerators.CUDAAccelerator)
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
