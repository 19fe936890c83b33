"""Block-sparse attention, decoding and the probes by Triton: checks of a call, and what the kernels are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_prune.kernels.backend import HeldBlocks
from sparse_prune.kernels.derived import derived
from sparse_prune.kernels.options import AttentionOptions
from sparse_prune.kernels.triton import ops, tuning
from sparse_prune.kernels.triton.configs import (
    KERNELS,
    Call,
    Traits,
    capability,
    decode_config,
    launch_config,
    most_rows,
    probe_config,
    processors,
    traits,
)
from sparse_prune.kernels.triton.interpreter import triton_interprets
from sparse_prune.kernels.triton.launch import launch_decode, launch_probe
from sparse_prune.kernels.triton.memory import within_memory
from sparse_prune.kernels.triton.tables import heads_together, index_tables, sent
from sparse_prune.pattern import BlockPattern, num_blocks
from sparse_prune.scores import BlockStatistics, Influence
from sparse_prune.scores.call import mask_heads

Plan = tuple[list[Tensor], list[int]]
"""Tables and configurations, as `ops.block_sparse_attention` takes them."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_BATCH = 65535
"""Of CUDA's grids: their second and third side."""


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions) -> Tensor:
    """Compute as `reference.attend`. Equal inputs give equal bits; the backward pass recomputes the weights.

    Raises:
        ValueError: If device, dtype, head size or block size are not supported; the message names the remedy.
    """
    query, key, value = _cast(query, key, value)
    check_supported(query)
    planned = plan(
        pattern, width(query, value), query.dtype, query.device, traits(options), key.shape[1], query.shape[0]
    )
    return attend_planned(query, key, value, planned, pattern.causal, options)


def attend_planned(
    query: Tensor, key: Tensor, value: Tensor, planned: Plan, causal: bool, options: AttentionOptions
) -> Tensor:
    """Compute as `attend`, by the tables of a pattern: torch.compile can trace all of it."""
    ops.refuse_forward_mode(query, key, value)
    query, key, value = _cast(query, key, value)
    value_dim, options = value.shape[3], replace(options, scale=_scale(query, options))
    query, key, value = same_width(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        output, _ = ops.block_sparse_attention(query, key, value, *planned, causal, *ops.option_arguments(options))
    output = torch.as_tensor(output)
    return output if output.shape[3] == value_dim else output[..., :value_dim]


def width(query: Tensor, value: Tensor) -> int:
    """Return the head size that the kernels compute with, which is one for keys and values."""
    return max(query.shape[3], value.shape[3])


def same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad query, key and value with zeros to one head size, which changes nothing if the scale is given."""
    wide = width(query, value)

    def padded(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[3] == wide else F.pad(tensor, (0, wide - tensor.shape[3]))

    return padded(query), padded(key), padded(value)


def _scale(query: Tensor, options: AttentionOptions) -> float:
    scale: float = query.shape[3] ** -0.5 if options.scale is None else options.scale
    return scale


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def plan(
    pattern: BlockPattern, head_dim: int, dtype: torch.dtype, device: torch.device, traits: Traits, kv_heads: int,
    batch: int,
) -> Plan:  # fmt: skip
    """Make index tables and launch configurations of a pattern, as `ops.block_sparse_attention` takes them.

    The configurations are those measured on this device for such calls, or the shipped ones. Plans are kept with the
    pattern until something new is measured. torch.compile takes the result for a constant: compile only what calls it
    with a frozen pattern. `traits` are `configs.traits(options)`.

    Raises:
        ValueError: If head size or block size are not supported.
    """
    call = Call(head_dim, dtype, pattern.block_size, *traits)
    tables, configs = derived(
        pattern, ("plan", call, device, kv_heads, batch), lambda: _plan(pattern, call, device, kv_heads, batch),
        tuning.revision,
    )  # fmt: skip
    return [*tables], [*configs]


def _plan(pattern: BlockPattern, call: Call, device: torch.device, kv_heads: int, batch: int) -> Plan:
    tables: list[Tensor] = []
    configs: list[int] = []
    for kernel in KERNELS:
        shipped = launch_config(kernel, capability(device), call)
        config = tuning.tuned(kernel, pattern, call, device) or shipped
        members = heads_together(pattern, config.tile, kv_heads, batch, device) if kernel == "dkdv" else None
        tables += index_tables(pattern, config.tile, device, members).tensors()
        configs += config.numbers()
    return tables, configs


def supports(query: Tensor, block_size: tuple[int, int]) -> bool:
    """Whether `attend` takes such a call under patterns of this block size."""
    call = Call(query.shape[3], query.dtype, block_size)
    return _taken(query, lambda: launch_config("forward", capability(query.device), call))


def probes(query: Tensor, block_size: tuple[int, int]) -> bool:
    """Whether `probe` takes such a call; arguments as there."""
    return _taken(query, lambda: probe_config(Call(query.shape[3], call_dtype(query), block_size)))


def _taken(query: Tensor, configure: Callable[[], object]) -> bool:
    try:
        check_supported(query)
        configure()
    except ValueError:
        return False
    return True


def check_supported(query: Tensor) -> None:
    """Refuse what the kernels cannot run.

    Raises:
        ValueError: If the tensor is not on a GPU (or Triton does not interpret), has another dtype or holds more
            sequences than a launch takes.
    """
    if query.device.type != "cuda" and not triton_interprets():
        raise ValueError(
            f"`query` must be on a CUDA device for backend 'triton', got {query.device}. "
            "Use backend='gather', or set TRITON_INTERPRET=1 before the import to check kernels on the CPU."
        )
    if query.dtype not in _DTYPES:
        raise ValueError(
            f"`query` must be of one of {_DTYPES} for backend 'triton', got {query.dtype}. Use backend='gather'."
        )
    if query.shape[0] > _MAX_BATCH:
        raise ValueError(
            f"`query` must hold at most {_MAX_BATCH} sequences for backend 'triton', got {query.shape[0]}. "
            "Split the batch, or use backend='gather'."
        )


def probe(
    query: Tensor,
    key: Tensor,
    block_size: tuple[int, int],
    *,
    causal: bool,
    options: AttentionOptions | None = None,
) -> BlockStatistics:
    """Collect row-mass statistics by the probe kernel, without a host synchronisation; arguments as `probe_attention`.

    The sums stay on the device. Logits that are not finite make the sums NaN; whoever reads them checks.

    Raises:
        ValueError: If the input is unsupported, or if `configs.probe_config` refuses head or block.
    """
    options = replace(options or AttentionOptions(), dropout_p=0.0, seed=None)
    query, key, _ = _cast(query, key, key)
    sums, rows = _probed(query.detach(), key.detach(), block_size, causal, options)
    per_block = torch.cat([sums[:2].double().sum(4), sums[2:].double().amax(4)])
    counts = torch.stack([rows.sum(0), (rows > 0).sum(0)])
    return BlockStatistics(per_block.sum(1), counts[..., None].double())


def influence(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, block_size: tuple[int, int], *, causal: bool,
    options: AttentionOptions, pattern: BlockPattern | None = None,
) -> BlockStatistics:  # fmt: skip
    """Collect the sums of `Influence` by the probe kernel, as `probe` does; arguments as in `probe_score`.

    Raises:
        ValueError: If the input is unsupported, or if `configs.probe_config` refuses head or block.
    """
    query, key, value = _cast(query, key, value)
    options = replace(options, scale=_scale(query, options), dropout_p=0.0, seed=None)
    query, key, value = (tensor.detach() for tensor in same_width(query, key, value))
    # The sums are linear in the gradient: of size 1 it suits every type.
    size = gradient.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    unit = F.pad((gradient / size).to(query.dtype), (0, query.shape[3] - gradient.shape[3]))
    if pattern is None:
        blocks = (num_blocks(query.shape[2], block_size[0]), num_blocks(key.shape[2], block_size[1]))
        keep = torch.ones(query.shape[1], *blocks, dtype=torch.uint8, device=query.device)
    else:
        keep = sent(pattern.keep.to(torch.uint8).contiguous(), query.device)
    sums, rows = _probed(query, key, block_size, causal, options, (value, unit, keep))
    counts = (rows > 0).any(0)[None, ..., None]
    return BlockStatistics(sums.double().sum((1, 4)) * size, counts.double(), (Influence().kind,))


def _probed(
    query: Tensor, key: Tensor, block_size: tuple[int, int], causal: bool, options: AttentionOptions,
    backward: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the probe; returns its sums and how many rows of a block may see a key, (batch, heads or 1, q_blocks)."""
    check_supported(query)
    config = probe_config(Call(query.shape[3], query.dtype, block_size, *traits(options)))
    sums, shown = within_memory(
        "probe", config, query, options,
        lambda config: launch_probe(query, key, block_size[0], config, causal, options, backward),
    )  # fmt: skip
    rows = shown.sum(3)
    return sums, rows.amax(1, keepdim=True) if mask_heads(options.attn_mask) == 1 else rows


@dataclass(frozen=True, eq=False)
class _DecodeTables:
    visits: tuple[Tensor, Tensor, Tensor]
    """Per key head the key tiles that any head of its group keeps for any of the rows: where each head's start, int32,
    (num_kv_heads + 1,), the tiles, and where in memory they stand."""
    keep: Tensor
    """uint8, (num_heads, rows, kv_blocks)."""
    most: int
    """Visits of the busiest key head."""


def decodes(query: Tensor, key: Tensor, value: Tensor | None = None) -> bool:
    """Whether a call has few enough rows (queries times heads of a KV group) for `decode`; shapes as there.

    Without a value it is taken for as wide as the query.
    """
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return rows <= most_rows(width(query, query if value is None else value), call_dtype(query))


def decode(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, options: AttentionOptions,
    held: HeldBlocks | None = None, kv_len: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention of the last few queries over the kept blocks of a cache, without gradients.

    The host does not wait for the device.

    Args:
        query: (batch, num_heads, q_len, head_dim), the last `q_len` of `kv_len` positions.
        key: (batch, num_kv_heads, kv_len, head_dim), or (batch, 1, slots, head_dim) with `held`.
        value: As `key`, with value_dim.
        pattern: A causal pattern of any lengths, continued by the rule of `BlockPattern.at`.
        options: Masks, scale and soft cap.
        held: Where each head's key blocks stand among the slots. None: all keys are there, in order.
        kv_len: Number of positions, with `held`.

    Returns:
        (batch, num_heads, q_len, value_dim). Rows that may attend to nothing are zero.

    Raises:
        ValueError: If the input is unsupported or a KV group has more rows than `configs.most_rows`; the message names
            the remedy.
    """
    ops.refuse_forward_mode(query, key, value)
    query, key, value = _cast(query, key, value)
    check_supported(query)
    value_dim, options = value.shape[3], replace(options, scale=_scale(query, options))
    query, key, value = same_width(query, key, value)
    if held is not None:  # not before: what is cast or padded is copied
        key, value = held.shown(key), held.shown(value)
    if not pattern.causal or options.dropout_p:
        raise ValueError(
            f"`pattern` must be causal and `dropout_p` 0 in decoding, got causal={pattern.causal} and "
            f"dropout_p={options.dropout_p}. Set the model to eval mode, or use backend='reference'."
        )
    heads, q_len, head_dim = query.shape[1:]
    kv_heads, length = key.shape[1], key.shape[2] if kv_len is None else kv_len
    config = decode_config(heads // kv_heads * q_len, head_dim, query.dtype, pattern.block_size)
    tables, first = _decode_tables(pattern, q_len, length, kv_heads, config.tile[1], query.device, held)
    splits = max(1, min(tables.most, -(-2 * processors(query.device) // (kv_heads * max(1, query.shape[0])))))
    output = within_memory(
        "decode", config, query, options,
        lambda config: launch_decode(
            query.detach(), key.detach(), value.detach(), length, tables.visits, tables.keep, first,
            pattern.block_size, config, splits, pattern.causal, options,
        ),
    )  # fmt: skip
    return output if output.shape[3] == value_dim else output[..., :value_dim]


def _decode_tables(
    pattern: BlockPattern, q_len: int, kv_len: int, kv_heads: int, tile: int, device: torch.device,
    held: HeldBlocks | None,
) -> tuple[_DecodeTables, int]:  # fmt: skip
    """Tables for the last `q_len` queries, and their first query block; built anew only where a block begins."""
    block_q, block_kv = pattern.block_size
    first, rows, cols = (kv_len - q_len) // block_q, num_blocks(kv_len, block_q), num_blocks(kv_len, block_kv)
    place = None if held is None else held.place

    def build() -> _DecodeTables:
        keep = pattern.keep_rows(first, rows, cols)
        union = keep.reshape(kv_heads, -1, keep.shape[2]).any(1)
        standing = torch.arange(cols).expand(kv_heads, -1) if place is None else place[:, :cols]
        union &= standing >= 0
        tiles = union.repeat_interleave(block_kv // tile, 1)
        places = (standing[..., None] * (block_kv // tile) + torch.arange(block_kv // tile)).flatten(1)
        start = F.pad(tiles.sum(1).cumsum(0), (1, 0))
        visits = (start, tiles.nonzero()[:, 1], places[tiles])
        on_device = [sent(tensor.to(torch.int32).contiguous(), device) for tensor in visits]
        most = int(tiles.sum(-1).max())
        return _DecodeTables((*on_device,), sent(keep.to(torch.uint8).contiguous(), device), most)  # type: ignore[arg-type]

    owner = pattern if held is None else held
    return derived(owner, ("decode", tile, kv_heads, device), build, lambda: (first, rows, cols)), first


def call_dtype(query: Tensor) -> torch.dtype:
    """What autocast asks for, or the query's own."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = call_dtype(query)
    return query.to(dtype), key.to(dtype), value.to(dtype)
