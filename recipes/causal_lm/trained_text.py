"""A record of how the training text was split, kept in the export, by which an evaluation finds the held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from sparse_prune.recipes.base.rows import PREFIX, place_of
from sparse_prune.recipes.base.sources import files_in
from sparse_prune.recipes.base.tables import files_at
from sparse_prune.recipes.base.turns import Document
from sparse_prune.recipes.causal_lm.documents import STDLIB, all_documents, split_text


def describe_split(text: str | list[str], held_out_share: float, seed: int) -> dict[str, Any]:
    """Describe how text was split, as JSON types; places on this machine are given as digests."""
    return {
        "places": sorted(map(_digest, _places([text] if isinstance(text, str) else text))),
        "held_out_share": held_out_share,
        "seed": seed,
    }


def unseen_documents(text: str | list[str], told: Mapping[str, Any] | None) -> tuple[Iterable[Document], str]:
    """Return documents that a model was not trained on, and a description of which part of the text they are.

    Of the training text, these are the test documents that the training held out; of other stdlib or `hub:NAME` text,
    those that causal_lm holds out; of any other text, all of it. Files are known by their paths, so that copies count
    as other text.

    Raises:
        ValueError: If the text overlaps with the training text, but is not the same.
    """
    names = [text] if isinstance(text, str) else text
    places = _places(names)
    if told and {*map(_digest, places)} == {*told["places"]}:
        held_out = split_text(text, told["held_out_share"], told["seed"])["test"]
        return held_out, "the part that the training held out"
    if told and {_digest(place) for one in places for place in _around(one)} & {*told["places"]}:
        raise ValueError(
            f"`text` must be all of the text that the model was trained on, of which the held-out part is taken, or "
            f"none of it, got {text!r}, which is only a part, or holds more. Name it as the training did, or name "
            "other text."
        )
    files = [name for name in names if name != STDLIB and not name.startswith(PREFIX)]
    others = [name for name in names if name not in files]
    documents = [*([split_text(others)["test"]] if others else []), *([all_documents(files)] if files else [])]
    parts = [f"of {', '.join(others)} the part that causal_lm holds out"] if others else []
    parts += ["all of it" if told else "all of it; the export does not tell what it was trained on"] if files else []
    return chain.from_iterable(documents), "; ".join(parts)


def _places(names: Iterable[str]) -> set[str]:
    """Name files and folders by their absolute paths, data sets by their names."""
    places = [name if name == STDLIB else place_of(name) for name in names]
    found = [(place, files_at(place.removeprefix(PREFIX))) for place in places]
    return {path for place, files in found for path in ([str(file.resolve()) for file in files] or [place])}


def _around(place: str) -> Iterator[str]:
    """Yield a place, the folders around it, and the files inside it."""
    path = Path(place)
    yield place
    if path.is_absolute():
        yield from map(str, path.parents)
        yield from (str(file) for file in files_in(path, tell=False)) if path.is_dir() else ()


def _digest(place: str) -> str:
    return hashlib.sha256(place.encode()).hexdigest()[:16]
