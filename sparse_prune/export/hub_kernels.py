"""Writes attention by patterns as a repository that the `kernels` package loads, for programs without this library."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from sparse_prune.files import whole_folder

_OURS = __name__.partition(".")[0]
_ENTRY = f"{_OURS}.export.hub_attention"
_NAME = "sparse-prune-attention"
_VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}
_INIT = '''"""Attention over the blocks that a pattern file keeps: `attn_implementation` of transformers."""

from .export.hub_attention import flash_attn_forward, supports_flash_attn

__all__ = ["flash_attn_forward", "supports_flash_attn"]
'''


def save_kernels(folder: str | os.PathLike[str]) -> Path:
    """Write attention by patterns as a kernel repository: Python and Triton, nothing compiled, without this library.

    `AutoModelForCausalLM.from_pretrained(export, attn_implementation="owner/name", allow_all_kernels=True)` attends by
    the patterns of an export where `kernels` finds the repository: on the hub (type "kernel", branch `v1`), or in a
    folder, with LOCAL_KERNELS="owner/name=folder" in the environment. "flash" must not occur in the name: transformers
    takes such for FlashAttention and hands over other masks. Layout: https://huggingface.co/docs/kernels. Unlike what
    is asked there, the code needs Python 3.11 and imports numpy, safetensors and huggingface_hub, as transformers does.

    Args:
        folder: The repository. Its `build` is replaced as a whole; whatever else is there stays.

    Returns:
        The folder.

    Raises:
        ValueError: If there is a `build` that this function did not write.
    """
    target = Path(folder).expanduser().resolve()
    build = target / "build"
    if build.exists() and not _is_own(build):
        raise ValueError(
            f"`folder` must have no `build` but one of {_NAME}, got {os.fspath(folder)!r}. Choose another folder."
        )
    sources = _sources()
    with whole_folder(build) as new:
        for variant, backend in _VARIANTS.items():
            _write(new / variant, backend, sources)
    return target


def _write(folder: Path, backend: str, sources: dict[str, str]) -> None:
    for path, source in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source, encoding="utf-8")
    digests = {path: hashlib.sha256(source.encode()).digest() for path, source in sorted(sources.items())}
    version = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    metadata = {
        "id": f"_{_NAME.replace('-', '_')}_{backend}_{version}",
        "name": _NAME,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(digest).decode() for path, digest in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _is_own(build: Path) -> bool:
    try:
        return all(json.loads((variant / "metadata.json").read_text())["name"] == _NAME for variant in build.iterdir())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sources() -> dict[str, str]:
    """Collect path in the package -> source, of the entry and all that it imports."""
    found: dict[str, str] = {}
    waiting = [_ENTRY]
    while waiting:
        module = waiting.pop()
        if module not in found:
            source = _file(module).read_text("utf-8")
            waiting += _imports(module, source)
            found[module] = _relative(module, source)
    paths = {str(_path(module)): source for module, source in found.items()}
    folders = {str(parent / "__init__.py") for path in paths for parent in Path(path).parents}
    # Of the other packages nothing is imported but their modules.
    return dict.fromkeys(sorted(folders), "") | paths | {"__init__.py": _INIT}


def _imports(module: str, source: str) -> list[str]:
    """List the modules of this library that one imports, inside functions too; all of a package that finds its own."""
    tree, found = ast.parse(source), []
    for node in _from_here(tree):
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            found.append(inner if _is_package(str(node.module)) and find_spec(inner) else str(node.module))
    if any(isinstance(node, ast.Name) and node.id == "iter_modules" for node in ast.walk(tree)):
        found += [f"{module}.{each.name}" for each in iter_modules([str(_file(module).parent)])]
    return found


def _relative(module: str, source: str) -> str:
    """Make imports from this library relative to the module, in its source."""
    dots = "." * (module.count(".") + _is_package(module))
    lines = source.splitlines(keepends=True)
    for node in _from_here(ast.parse(source)):
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = re.sub(rf"from {_OURS}\.?", f"from {dots}", line, count=1)
    return "".join(lines)


def _from_here(tree: ast.Module) -> list[ast.ImportFrom]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return [node for node in nodes if str(node.module).partition(".")[0] == _OURS]


def _file(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None
    return Path(str(spec.origin))


def _is_package(module: str) -> bool:
    return _file(module).name == "__init__.py"


def _path(module: str) -> Path:
    """Return the path of a module in the package."""
    parts = module.split(".")[1:]
    return Path(*parts, "__init__.py") if _is_package(module) else Path(*parts).with_suffix(".py")
