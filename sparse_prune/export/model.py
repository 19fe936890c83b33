"""Saves a pruned model as a folder: the model's own files, and its patterns beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from sparse_prune.attention.handles import handles_in
from sparse_prune.distributed import is_first_rank, on_first_rank
from sparse_prune.export.card import CARD, PICTURE, is_own, tell_of_card, write_card
from sparse_prune.export.loadable import empty_twin, loadable, quantization
from sparse_prune.export.loading import HALVES, HEADER, absolute, identity
from sparse_prune.export.patterns import PATTERN_FILE, read_pattern_file, save_patterns
from sparse_prune.export.provenance import describe_pruning
from sparse_prune.files import carry_over, file_hash, obstacle, whole_folder
from sparse_prune.pattern import BlockPattern
from sparse_prune.pruner import AttentionPruner
from sparse_prune.sharded import is_sharded, whole_weights

log = logging.getLogger(__name__)


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    pruner: AttentionPruner | None = None,
    tokenizer: Any = None,
    base_model: str | None = None,
    data: str | None = None,
    held_out: Mapping[str, Any] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a pruned model: what its `save_pretrained` writes, its patterns, and a model card.

    The folder is written whole or not at all; an earlier export in its place is replaced in one step, and files that
    others have put there stay. Any transformers program can read it as a dense model; `load` gives the pruned one.

    With several processes call it on every rank; rank 0 writes. A model that FSDP2 keeps in parts is put together from
    all of them, so a rank that does not call leaves the others waiting; all return once it is written. Of a whole
    model, as under DDP, the other ranks have nothing to give, and return at once.

    Args:
        model: A transformers model with patterns, compiled, sharded by `fully_shard`, or neither.
        folder: New, empty, or an earlier export; a link to a folder stays one, and its permissions stay.
        pruner: What pruned it, for the header: schedule, settings and a summary of the scores.
        tokenizer: To be saved with it.
        base_model: What it was fine-tuned from, for the card; None: the hub's name that it was loaded by, if any.
        data: What it was trained on, in words, for the card.
        held_out: Tells which part of the data it was not trained on, as JSON types, for `sparse-prune evaluate`.
        evaluation: A folder that `sparse-prune evaluate` wrote, for the card. A README.md of others, or one that was
            edited, stays, and the log says so.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: If no layer has a pattern, if `load` could not make the model again, if `check_folder` refuses the
            folder, or if `evaluation` holds no evaluation.
        RuntimeError: On other ranks than 0, if rank 0 failed to write a sharded model.
    """
    model = loadable(model)
    told = {"base_model": base_model or _hub_name(model), "data": data, "held_out": held_out}
    write = partial(_write, model, folder, pruner, tokenizer, told, evaluation)
    if is_sharded(model):
        return on_first_rank(partial(write, whole_weights(model)))
    return write(None) if is_first_rank() else absolute(folder)


def _write(
    model: Any,
    folder: str | os.PathLike[str],
    pruner: AttentionPruner | None,
    tokenizer: Any,
    told: Mapping[str, Any],
    evaluation: str | os.PathLike[str] | None,
    weights: dict[str, Tensor] | None,
) -> Path:
    """Write an export; `weights` are those of a sharded model."""
    target = absolute(folder)
    patterns, layers = _state(model)
    check_folder(folder)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    if len(dtypes) > 1:
        log.warning("The model mixes %s; transformers loads it in one of them.", sorted(map(str, dtypes)))
    with whole_folder(target) as new:
        _save_model(model, new, weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        files = {str(file.relative_to(new)): file_hash(file) for file in sorted(new.rglob("*")) if file.is_file()}
        details = {
            "library": f"sparse_prune {version('sparse_prune')}",
            "model": identity(model),
            "attention": layers,
            "buffers": _buffers(model),
            "files": files,
            **told,
            **({} if pruner is None else describe_pruning(pruner, _names(model))),
        }
        save_patterns(patterns, new / PATTERN_FILE, details)
        if is_own(target / CARD):
            write_card(new, evaluation)
        else:
            tell_of_card(target)
        if (earlier := _export_header(target)) is not None:
            carry_over(target, new, {PATTERN_FILE, *earlier["files"]})
    return target


def check_folder(folder: str | os.PathLike[str], argument: str = "folder") -> None:
    """Refuse a folder that `save_pretrained` would refuse; ask before a long training, not after it.

    Args:
        folder: New, empty, or an earlier export.
        argument: What the error calls it.

    Raises:
        ValueError: If `folder` holds something else, or if no other folder can take its place: a mount point, the
            working folder, a place where this process may not write.
    """
    target = absolute(folder)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and _export_header(target) is None:
        raise ValueError(
            f"`{argument}` must be new, empty or an earlier export, got {os.fspath(folder)!r} without a "
            f"{PATTERN_FILE} of an export. Choose another folder."
        )
    reason = obstacle(target)
    if reason is not None:
        raise ValueError(
            f"`{argument}` must be a folder that another can take the place of, got {os.fspath(folder)!r}: {reason}. "
            "Name a folder inside it, or elsewhere."
        )


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
    **saving: Any,
) -> str:
    """Put an export on the hub in one commit, with `huggingface_hub`; `load(repo_id)` gets it back.

    A card that the repository has of others, or that was edited, stays.

    Args:
        model: As in `save_pretrained`. With several processes call it on every rank if the model is sharded, on rank 0
            alone if it is whole.
        repo_id: "owner/name"; made if it does not exist.
        private: Whether a new repository is private; None: the owner's default.
        revision: Branch to commit to.
        token: Access token of the hub; None: that of the user who is logged in.
        commit_message: What the commit says.
        **saving: The other arguments of `save_pretrained`: `pruner`, `tokenizer` and what the card tells.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    def upload(folder: Path) -> str:
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=_cards_to_leave(api, repo_id, revision),
            # Shards of an earlier, larger export would be left over.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
        return str(commit.commit_url)

    with TemporaryDirectory() as parent:
        folder = save_pretrained(model, Path(parent) / "export", **saving)
        return on_first_rank(partial(upload, folder)) if is_sharded(model) else upload(folder)


def _cards_to_leave(api: Any, repo_id: str, revision: str | None) -> list[str]:
    """List the files of the export that must not replace those of a repository."""
    if not api.file_exists(repo_id, CARD, revision=revision):
        return []
    if is_own(Path(api.hf_hub_download(repo_id, CARD, revision=revision))):
        return []
    tell_of_card(repo_id)
    return [CARD, PICTURE]


def _hub_name(model: Any) -> str | None:
    """Return the hub's name that a model was loaded by; None if it was a folder, whose path is not told."""
    name = str(model.config.name_or_path)
    return name if name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists() else None


def _state(model: Any) -> tuple[dict[str, BlockPattern], dict[str, dict[str, Any]]]:
    """Return the patterns by layer name, and how each layer computes."""
    patterns, layers = {}, {}
    for name, handle in handles_in(model).items():
        if handle.pattern is None:
            continue
        patterns[name] = handle.pattern
        layers[name] = {
            "num_heads": handle.num_heads,
            "num_kv_heads": handle.num_kv_heads,
            "mode": handle.mode,
            "backend": handle.backend,
        }
    if not patterns:
        raise ValueError(
            "`model` must have attention patterns, got none. Prune it first, or use its own save_pretrained."
        )
    return patterns, layers


def _names(model: Any) -> dict[str, str]:
    """Map a layer's name for the pruner, which may know a module around the model, to its name in the model."""
    return {handle.name: name for name, handle in handles_in(model).items()}


def _buffers(model: Any) -> dict[str, str]:
    """Tell the types of buffers that loading makes anew: `model.to(bfloat16)` casts rotary frequencies, loading not."""
    saved = model.state_dict()
    kinds = {name: str(b.dtype).removeprefix("torch.") for name, b in model.named_buffers() if name not in saved}
    return {name: kind for name, kind in kinds.items() if kind in HALVES}


def _save_model(model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    """Save the model's own files; `weights` are those of a sharded model."""
    if weights is None and quantization(model) != "gguf":
        model.save_pretrained(folder)
        return
    # The model has not got its whole weights, or transformers does not save what it loaded from GGUF.
    shell = empty_twin(model).to(model.dtype)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=model.state_dict() if weights is None else weights)


def _export_header(folder: Path) -> dict[str, Any] | None:
    """Read the header of an export; None if the folder holds none."""
    try:
        header = read_pattern_file(folder / PATTERN_FILE)[1]
    except (FileNotFoundError, ValueError):
        return None
    return header if HEADER.issubset(header) else None
