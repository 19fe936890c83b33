"""Loads an export: checks its files, makes the model again, and puts the patterns on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from sparse_prune.attention import PrunableAttention
from sparse_prune.attention.apply import fitting_layers
from sparse_prune.attention.layer import Mode
from sparse_prune.export.loadable import check_loaded, model_class
from sparse_prune.export.patterns import PATTERN_FILE, read_pattern_file
from sparse_prune.files import file_hash, previous
from sparse_prune.kernels import BACKENDS, check_backend, usable_backend
from sparse_prune.pattern import BlockPattern
from sparse_prune.sharded import plain_class

HEADER = {"model", "attention", "buffers", "files"}
"""What the header of an export holds, and that of patterns alone does not."""
HALVES = ("bfloat16", "float16")
"""Types of buffers that a header tells."""
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size")


def load(
    name: str | os.PathLike[str],
    *,
    backend: str | None = None,
    verify: bool = True,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> Any:
    """Load a pruned model as it was saved, in eval mode; on the same machine its logits are the same, bit for bit.

    Another machine, or another `backend`, gives them up to rounding. No file is unpickled and no code of the folder
    runs.

    Args:
        name: A folder that `save_pretrained` wrote, or a hub repository.
        backend: One of `BACKENDS` for all pruned layers; None: those at the time of saving ("gather" in place of
            "triton" where there is no GPU).
        verify: Whether to compare every file's SHA-256 with the one at the time of saving.
        revision: Branch, tag or commit of the hub repository.
        token: Access token of the hub.
        **options: Passed to the model class's `from_pretrained`; its dtype is that of the export unless given.

    Raises:
        FileNotFoundError: If there is no such folder, or no patterns in it.
        ValueError: If a file was altered, or if patterns, weights and model do not belong together; the message names
            what differs.
    """
    if backend is not None:
        check_backend(backend)
    if "output_loading_info" in options:
        raise ValueError("`output_loading_info` must be left out: weights that do not fit are an error. Remove it.")
    folder = _fetch(os.fspath(name), revision, token)
    if not (folder / PATTERN_FILE).is_file():
        raise FileNotFoundError(
            f"`name` must be a folder or repository with {PATTERN_FILE}, got {os.fspath(name)!r}. "
            "Write it with `sparse_prune.export.save_pretrained`."
        )
    patterns, header = read_pattern_file(folder / PATTERN_FILE)
    if not HEADER.issubset(header):
        raise ValueError(
            f"{PATTERN_FILE} must belong to an export, got patterns alone. Put them on a model with `load_patterns` "
            "and `sparse_prune.attention.apply_patterns`."
        )
    if verify:
        _verify(folder, header["files"])
    kind = model_class(header["model"]["class"])
    if kind is None:
        raise ValueError(
            f"The exported model must be of a class of transformers, got {header['model']['class']!r}. "
            "Update transformers."
        )
    settings = {"dtype": "auto", "trust_remote_code": False, **options, "use_safetensors": True}
    model, report = kind.from_pretrained(folder, **settings, output_loading_info=True)
    _compare("class", header["model"], identity(model))
    check_loaded(kind, report)
    _cast_buffers(model, header["buffers"])
    _apply(model, patterns, header["attention"], backend)
    return model.eval()


def export_header(
    name: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Read what an export tells of itself, as JSON types.

    Args:
        name: A folder that `save_pretrained` wrote, or a hub repository.
        revision: Branch, tag or commit of the hub repository.
        token: Access token of the hub.

    Raises:
        FileNotFoundError: If there is no such folder, or no patterns in it.
        ValueError: If the patterns cannot be read.
    """
    return read_pattern_file(_fetch(os.fspath(name), revision, token) / PATTERN_FILE)[1]


def identity(model: Any) -> dict[str, Any]:
    """Return what must agree for patterns to fit a model."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    return {"class": plain_class(model).__name__, "model_type": model.config.model_type, **shape}


def absolute(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder as users write it."""
    return Path(folder).expanduser().resolve()


def _fetch(name: str, revision: str | None, token: str | None) -> Path:
    folder = absolute(name)
    if folder.is_dir():
        return folder
    if previous(folder).is_dir():
        return previous(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"`name` must be an existing folder, got {name!r}. Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"`name` must be an existing folder or hub repository, got {name!r}, which is not a folder here and which "
            "the hub did not give. Check the path, or the repository, `revision`, `token` and the network."
        ) from error


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{PATTERN_FILE} must name files of its own folder, got {name!r}.")
        if not path.is_file():
            raise ValueError(f"The export must hold {name!r}, which is missing. Copy or download it again.")
        if file_hash(path) != expected:
            raise ValueError(
                f"{name!r} was altered since the patterns were saved. Export the model again, "
                "or load with verify=False if you changed it yourself."
            )


def _compare(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} {expected[key]!r} there, {found.get(key)!r} here" for key in expected if expected[key] != found.get(key)
    ]
    if wrong:
        raise ValueError(f"The patterns are of another model: {'; '.join(wrong)} ({what} {found.get('class')}).")


def _cast_buffers(model: Any, kinds: Mapping[str, str]) -> None:
    known = dict(model.named_buffers())
    for name, kind in kinds.items():
        if name not in known or kind not in HALVES:
            raise ValueError(f"The patterns are of another model: it has a buffer {name!r} of type {kind!r}.")
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, known[name].to(getattr(torch, kind)))


def _apply(
    model: Any, patterns: Mapping[str, BlockPattern], layers: Mapping[str, Mapping[str, Any]], backend: str | None
) -> None:
    """Put patterns on a model. Nothing is changed if anything does not fit."""
    handles = fitting_layers(model, patterns)
    if patterns.keys() != layers.keys():
        raise ValueError(f"The header must describe the layers that have patterns, got {sorted(layers)[:4]}.")
    for name, handle in handles.items():
        _check_layer(handle, layers[name])
    for name, handle in handles.items():
        part = layers[name]
        handle.pattern = patterns[name]
        handle.mode = "sparse" if backend is not None and part["mode"] == "masked" else part["mode"]
        handle.backend = backend or usable_backend(part["backend"])


def _check_layer(handle: PrunableAttention, part: Mapping[str, Any]) -> None:
    if part["num_kv_heads"] != handle.num_kv_heads:
        raise ValueError(
            f"The patterns are of another model: layer {handle.name!r} has {part['num_kv_heads']} key heads there, "
            f"{handle.num_kv_heads} here."
        )
    if part["mode"] not in get_args(Mode) or part["backend"] not in BACKENDS:
        raise ValueError(
            f"Layer {handle.name!r} must have one of the modes {get_args(Mode)} and a known backend, got {dict(part)}."
        )
