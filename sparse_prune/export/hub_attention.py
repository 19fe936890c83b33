"""The attention function of the kernel package that `save_kernels` writes: it finds a model's patterns by itself."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_prune.attention.handles import FoundLayer, give_handle, handle_of
from sparse_prune.attention.hf_attention import attention_forward
from sparse_prune.attention.layer import Mode
from sparse_prune.export.patterns import PATTERN_FILE, read_pattern_file
from sparse_prune.kernels import usable_backend
from sparse_prune.pattern import BlockPattern

log = logging.getLogger(__name__)

supports_flash_attn = True
"""By this and `flash_attn_forward` transformers knows a package that brings an attention function with SDPA's masks."""


class _Layer(NamedTuple):
    """What a pattern file says of a layer."""

    name: str
    pattern: BlockPattern
    num_kv_heads: int | None
    mode: Mode
    backend: str


def flash_attn_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over the blocks that the model's pattern file keeps; a layer without a pattern sees everything.

    Arguments and result are those of transformers' AttentionInterface, with SDPA's masks. The `name_or_path` of the
    layer's `config` is an export.

    Raises:
        ValueError: If there is no pattern file, or it is of another model.
    """
    if handle_of(module) is None:
        _give_pattern(module, query, key)
    q_len = query.shape[2]
    if attention_mask is None and 1 < q_len < key.shape[2]:  # the first tokens in a static cache, by SDPA's causality
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    elif attention_mask is not None and attention_mask.dim() == 4 and q_len < attention_mask.shape[-1]:
        attention_mask = _without_room(attention_mask)
    return attention_forward(module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _give_pattern(module: Any, query: Tensor, key: Tensor) -> None:
    """Put the layer's pattern on it, if it has one."""
    config, index = module.config, getattr(module, "layer_idx", None)
    if index is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"Attention by patterns needs layers that know their number in the one stack of the model, got one of "
            f"{type(module).__name__}. Load this model with `sparse_prune.export.load`."
        )
    file = _pattern_file(config)
    layer = _layers(file, file.stat().st_mtime_ns).get(index)
    if layer is None:
        return
    heads, kv_heads = query.shape[1], key.shape[1]
    there = layer.pattern.num_heads, layer.num_kv_heads or kv_heads
    if there != (heads, kv_heads):
        raise ValueError(
            f"{file} is of another model: layer {layer.name!r} has {there} query and key heads there, "
            f"{(heads, kv_heads)} here. Load the model from the export itself."
        )
    found = FoundLayer(layer.name, "transformers", module, heads, kv_heads, layer.pattern.causal, seen=True)
    handle = give_handle(found)
    handle.pattern, handle.mode, handle.backend = layer.pattern, layer.mode, usable_backend(layer.backend)


def _pattern_file(config: Any) -> Path:
    """Find the pattern file beside the model's weights, in the folder or hub repository that it was loaded from."""
    name = str(getattr(config, "name_or_path", ""))
    if name and Path(name).is_dir():
        file = Path(name, PATTERN_FILE).resolve()
        if file.is_file():
            return file
    elif name:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(name, PATTERN_FILE, revision=getattr(config, "_commit_hash", None)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            log.info("%s gave no %s: %s", name, PATTERN_FILE, error)
    raise ValueError(
        f"Attention by patterns needs a model from a folder or repository with {PATTERN_FILE}, got {name!r}. Load one "
        "that `sparse_prune.export.save_pretrained` wrote; where a model of several parts keeps the name to itself, "
        "set `name_or_path` of the part's config."
    )


@lru_cache(maxsize=2)
def _layers(file: Path, stamp: int) -> dict[int, _Layer]:
    """Number of a layer -> what the file says of it; `stamp` tells one state of the file from another."""
    patterns, header = read_pattern_file(file)
    layers: dict[int, _Layer] = {}
    for name, pattern in patterns.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if len(numbers) != 1 or int(numbers[0]) in layers:
            raise ValueError(
                f"{file} must name each layer by a number of its own, got {sorted(patterns)[:4]}. Load this model with "
                "`sparse_prune.export.load`."
            )
        part = header.get("attention", {}).get(name, {})
        mode, backend = part.get("mode", "sparse"), part.get("backend", "triton")
        layers[int(numbers[0])] = _Layer(name, pattern, part.get("num_kv_heads"), mode, backend)
    log.info("Layers %s attend by the patterns of %s, others to everything.", sorted(layers), file)
    return layers


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _without_room(mask: Tensor) -> Tensor:
    """Cut the places of a static cache that wait for later keys off a mask of the last queries.

    These are the last places, which no sample's last query sees: the latest token of the longest sample is no padding.
    The mask is (batch, 1 or num_heads, q_len, kv_len).
    """
    last = mask[:, :, -1]
    seen = (last if last.dtype == torch.bool else last == 0).flatten(0, -2).any(0).nonzero()
    width = int(seen.max()) + 1 if seen.numel() else 0
    return mask[..., : max(width, mask.shape[2])]
