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


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; arguments and errors as in `locate`."""
    from transformers import AutoTokenizer

    where, options = locate(model)
    return AutoTokenizer.from_pretrained(where, **options)
