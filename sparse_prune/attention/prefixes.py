"""Layers whose names differ by one prefix: those of two models, or of a model and of the module around it."""

from __future__ import annotations

from collections.abc import Collection


def renamings(names: Collection[str], others: Collection[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Find the exchanges of one prefix for another that turn all names into some of the others.

    Returns:
        (prefix, other prefix) -> name -> other name; prefixes are whole parts of a name, up to a dot.
    """
    ways = {_prefixes(name, other) for name in list(names)[:1] for other in others}
    found = {
        (cut, put): {name: put + name.removeprefix(cut) for name in names if name.startswith(cut)}
        for cut, put in sorted(ways)
    }
    return {way: map_ for way, map_ in found.items() if len(map_) == len(names) and set(map_.values()) <= set(others)}


def _prefixes(name: str, other: str) -> tuple[str, str]:
    """Return the prefixes of two names before their longest common suffix, in whole parts."""
    one, two = name.split("."), other.split(".")
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    cut, put = (".".join([*parts[: len(parts) - common], ""]) for parts in (one, two))
    return cut, put
