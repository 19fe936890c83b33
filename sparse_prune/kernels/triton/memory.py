"""A safety net: a kernel that does not fit a device's shared memory is launched with fewer pipeline stages."""

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
"""Kind of call -> stages that fit, so that later launches need not fail first."""


def within_memory(
    kernel: str, config: LaunchConfig, query: Tensor, options: AttentionOptions, launch: Callable[[LaunchConfig], _T]
) -> _T:
    """Launch by a configuration, or by the same one with fewer pipeline stages if the device has too little memory.

    Triton refuses a launch before it starts. The tiles stay, because index tables belong to them; each stage holds one
    pair of tiles in shared memory. A warning says each step down once for a kind of call, which query and options tell.

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
                    f"A call must fit the memory of the {kernel} kernel on {query.device}, got head_dim "
                    f"{query.shape[3]} and {query.dtype} with {config}: {error} Use backend='gather'."
                ) from error
            log.warning("The %s kernel with %s: %s It is launched with %d stages.", kernel, config, error, stages - 1)
            _STAGES[call] = stages - 1
    raise AssertionError("a configuration has at least one stage")
