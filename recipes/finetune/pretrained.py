"""Where pretrained weights lie: a hub id, a folder, a GGUF file, or a file or folder inside an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = "package:"


def locate(model: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: folder or hub id, and the GGUF file in it.

    Args:
        model: Hub id, local folder, path of a `.gguf` file, or `package:NAME/PATH` for a folder or a `.gguf` file that
            the installed Python package NAME carries.

    Raises:
        FileNotFoundError: If a file or folder that is named is not there.
        ModuleNotFoundError: If the package is not installed.
    """
    if model.startswith(_PACKAGE):
        package, _, file = model.removeprefix(_PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"`model` must name an installed package after 'package:', got {package!r}. "
                f"Install it: pip install {package.replace('_', '-')}"
            )
        path = Path(spec.origin).parent / file
    else:
        path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"`model` must be an existing GGUF file, got {str(path)!r}. Check the path.")
        return str(path.parent), {"gguf_file": path.name}
    if model.startswith((".", "/", "~", _PACKAGE)) and not path.is_dir():
        raise FileNotFoundError(f"`model` must be an existing folder, got {str(path)!r}. Check the path.")
    return str(path) if path.is_dir() else model, {}


def longest_input(model: Any) -> int | None:
    """Tokens that a transformers model has positions for; None if its configuration names no limit."""
    longest: int | None = getattr(model.config, "max_position_embeddings", None)
    return longest if longest is not None and longest > 0 else None


def check_length(model: Any, length: int, argument: str) -> None:
    """Refuse inputs that a transformers model has no positions for.

    Args:
        model: The model.
        length: Tokens.
        argument: What set the length.

    Raises:
        ValueError: If the model's positions end before.
    """
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise ValueError(f"`{argument}` must be at most {longest}, the model's own, got {length}. Lower it.")


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; arguments and errors as in `locate`."""
    from transformers import AutoTokenizer

    where, options = locate(model)
    return AutoTokenizer.from_pretrained(where, **options)
