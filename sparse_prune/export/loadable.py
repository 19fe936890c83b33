"""Whether `load` can make a model again: a class of transformers, with the weights of that class and no others."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch

from sparse_prune.sharded import plain_class
from sparse_prune.words import some


def loadable(model: Any) -> Any:
    """Return a transformers model as `load` makes it again: without the wrapper of torch.compile.

    Raises:
        ValueError: If its class is not one of transformers, or its weights are not those of its class.
    """
    model = getattr(model, "_orig_mod", model)
    kind = plain_class(model)
    if model_class(kind.__name__) is not kind:
        merging = "Merge its adapters first: `model = model.merge_and_unload()`."
        plain = "Give the transformers model itself, or save the patterns alone with `save_patterns`."
        raise ValueError(
            f"`model` must be of a class of transformers, so that `load` can make it again, got "
            f"{kind.__module__}.{kind.__qualname__}. {merging if hasattr(model, 'merge_and_unload') else plain}"
        )
    if difference := _from_its_class(model):
        raise ValueError(
            f"`model` must have the weights of {kind.__name__}, so that `load` can make it again, got "
            f"{difference}. Merge adapters, give it its own layers back, tie weights by its configuration, or "
            "save the patterns alone with `save_patterns`."
        )
    return model


def _from_its_class(model: Any) -> str:
    """Tell how a model's weights differ from those of its class; empty if they do not."""
    found = _shapes(model)
    if quantization(model) not in (None, "gguf"):
        # The quantizer put layers of its own into the model while it was loaded. Adapters keep those as `base_layer`.
        return _difference(missing=(), unexpected=[name for name in found if ".base_layer." in name], reshaped=())
    twin = empty_twin(model)
    wanted = _shapes(twin)
    return _difference(
        missing=wanted.keys() - found.keys(),
        unexpected=found.keys() - wanted.keys(),
        reshaped=[name for name in wanted.keys() & found.keys() if wanted[name] != found[name]],
        shared=_shared(model) - _shared(twin),
    )


def check_loaded(kind: type[Any], report: Mapping[str, Any]) -> None:
    """Refuse a model of class `kind` whose weights did not all come from its files, or that has no place for some.

    `report` is what `from_pretrained` gives with `output_loading_info=True`.

    Raises:
        ValueError: If something is missing, left over, or of another shape.
    """
    difference = _difference(
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        reshaped=[name for name, *_ in report["mismatched_keys"]],
    )
    if difference:
        raise ValueError(
            f"The export must hold the weights of {kind.__name__}, got {difference}. Export the model again."
        )


def model_class(name: str) -> Any:
    """Return transformers' model class of that name; None if there is none."""
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def quantization(model: Any) -> str | None:
    """Tell how the model's weights are quantized; "gguf" if they were, in the file that it was loaded from."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def empty_twin(model: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """Make what `load` makes before it reads weights: the same class, on the meta device, its configuration changed."""
    config = copy.deepcopy(model.config)
    if changes:
        config = type(config).from_dict({**config.to_dict(), **changes})
    if quantization(model) == "gguf":  # plain numbers by now
        del config.quantization_config
    with torch.device("meta"):
        twin = plain_class(model)(config)
    twin.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return twin


def _shapes(model: Any) -> dict[str, Any]:
    """Return the shapes of weights; None for those that a quantizer keeps in a form of its own."""
    return {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}


def _shared(model: Any) -> set[str]:
    """Return the names of parameters that have another name before."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if first.setdefault(id(parameter), name) != name}


def _difference(
    missing: Collection[str], unexpected: Collection[str], reshaped: Collection[str], shared: Collection[str] = ()
) -> str:
    """Tell the differences; empty if there are none."""
    parts = {"none for": missing, "also": unexpected, "other shapes for": reshaped, "those of others for": shared}
    return "; ".join(f"{what} {some(sorted(names))}" for what, names in parts.items() if names)
