"""What an export tells of the text that it was trained on, so that an evaluation takes what was held out."""

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
    """How text was split, as JSON types; of places on this machine digests alone.

    Args:
        text: As for `TextDataModule`, like all others.
        held_out_share: Share of documents in validation and in test, each.
        seed: Order of the documents.
    """
    return {
        "places": sorted(map(_digest, _places([text] if isinstance(text, str) else text))),
        "held_out_share": held_out_share,
        "seed": seed,
    }


def unseen_documents(text: str | list[str], told: Mapping[str, Any] | None) -> tuple[Iterable[Document], str]:
    """Documents that a model was not trained on, and in words which part of the text they are.

    Of the text that it was trained on, and of stdlib and `hub:NAME` in any case, that is what the training held out as
    test; of other text, all. Files are known by where they lie: a copy of them is other text.

    Args:
        text: As for `TextDataModule`.
        told: What `describe_split` told; None: nothing is known of the training.

    Raises:
        ValueError: If a part of the text was trained on, so that nobody knows what of it was held out.
    """
    names = [text] if isinstance(text, str) else text
    places = {*map(_digest, _places(names))}
    if told and places == {*told["places"]}:
        held_out = split_text(text, told["held_out_share"], told["seed"])["test"]
        return held_out, "the part that the training held out"
    if told and {_digest(place) for one in _places(names) for place in _around(one)} & {*told["places"]}:
        raise ValueError(
            f"`text` must be all of the text that the model was trained on, of which the held-out part is taken, or "
            f"none of it, got {text!r}, which is a part, or more. Name it as the training did, or name other text."
        )
    files = [name for name in names if name != STDLIB and not name.startswith(PREFIX)]
    others = [name for name in names if name not in files]
    documents = [*([split_text(others)["test"]] if others else []), *([all_documents(files)] if files else [])]
    parts = [f"of {', '.join(others)} the part that causal_lm holds out"] if others else []
    parts += ["all of it" if told else "all of it; the export does not tell what it was trained on"] if files else []
    return chain.from_iterable(documents), "; ".join(parts)


def _places(names: Iterable[str]) -> set[str]:
    """Files, folders and data sets; what lies on this machine by its whole path."""
    places = [name if name == STDLIB else place_of(name) for name in names]
    found = [(place, files_at(place.removeprefix(PREFIX))) for place in places]
    return {path for place, files in found for path in ([str(file.resolve()) for file in files] or [place])}


def _around(place: str) -> Iterator[str]:
    """A place, what it lies in, and what lies in it."""
    path = Path(place)
    yield place
    if path.is_absolute():
        yield from map(str, path.parents)
        yield from (str(file) for file in files_in(path, tell=False)) if path.is_dir() else ()


def _digest(place: str) -> str:
    return hashlib.sha256(place.encode()).hexdigest()[:16]
