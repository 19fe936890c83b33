"""The safety net under the launch configurations: what does not fit a device's shared memory is launched smaller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton.configs import LaunchConfig, traits

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_STAGES: dict[tuple[object, ...], int] = {}
"""What launches had to be cut down to, so that later ones need not fail first."""


def within_memory(
    kernel: str, config: LaunchConfig, query: Tensor, options: AttentionOptions, launch: Callable[[LaunchConfig], _T]
) -> _T:
    """A launch by a configuration, or by the same one with fewer pipeline stages if the device has too little memory.

    Triton refuses a launch before it starts. The tiles stay, for index tables belong to them; each stage holds one
    pair of tiles in shared memory. Each step down is warned of once.

    Args:
        kernel: Its name, for the warning.
        config: What is tried first.
        query: (batch, num_heads, q_len, head_dim); its dtype, device and head size are part of what needs memory.
        options: Masks, soft cap and dropout, which are too.
        launch: Launches by a configuration.

    Raises:
        ValueError: If a single stage does not fit either; the message names the remedy.
    """
    call = (kernel, config, query.shape[3], query.dtype, query.device, *traits(options))
    for stages in range(_STAGES.get(call, config.num_stages), 0, -1):
        try:
            return launch(replace(config, num_stages=stages))
        except OutOfResources as error:
            if stages == 1:
                raise ValueError(
                    f"The {kernel} kernel needs more memory than {query.device} has, with {config}, head_dim "
                    f"{query.shape[3]} and {query.dtype}: {error} Use backend='gather'."
                ) from error
            log.warning("%s with %s and %d stages: %s One stage less is used.", kernel, config, stages, error)
            _STAGES[call] = stages - 1
    raise AssertionError("a configuration has at least one stage")
