"""Loading a causal language model by hub id, folder, GGUF file, or file inside an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PACKAGE = "package:"


def load_model(model: str) -> Any:
    """A causal language model in float32.

    Args:
        model: Hub id, local folder, path of a `.gguf` file, or `package:NAME/FILE.gguf` for a file that the
            installed Python package NAME carries.

    Raises:
        FileNotFoundError: If a file or folder that is named is not there.
        ModuleNotFoundError: If the package is not installed.
        OSError: If the hub does not have the model or cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    where, options = _locate(model)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; arguments and errors as in `load_model`."""
    from transformers import AutoTokenizer

    where, options = _locate(model)
    return AutoTokenizer.from_pretrained(where, **options)


def _locate(model: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: folder or hub id, and the GGUF file in it."""
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
