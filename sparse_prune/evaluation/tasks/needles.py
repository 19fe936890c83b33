"""Facts hidden in a text: passkeys, needles with one and several keys, values and queries, key-value recall, turns."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from sparse_prune.evaluation.tasks.pools import NAMES, number
from sparse_prune.evaluation.tasks.task import Facts, Split, Task, Wording


def _keys(keys: int, asked: int) -> Callable[[Random, Wording, Split], Facts]:
    def make(random: Random, wording: Wording, split: Split) -> Facts:
        pairs = [(name, number(random, split)) for name in random.sample(NAMES[split], keys)]
        facts = [wording.fact.format(name=name, key=key) for name, key in pairs]
        chosen = list(enumerate(pairs))[:asked]
        asks: list[tuple[str, str, int | None]]
        asks = [(wording.question.format(name=name), f" {key}", index) for index, (name, key) in chosen]
        return Facts(facts, asks)

    return make


def _values(random: Random, wording: Wording, split: Split) -> Facts:
    name, keys = random.choice(NAMES[split]), [number(random, split) for _ in range(2)]
    facts = [
        wording.fact.format(name=name, key=key, nth=nth) for nth, key in zip(("first", "second"), keys, strict=True)
    ]
    return Facts(facts, [(wording.question.format(name=name), f" {keys[0]} and {keys[1]}", None)])


_CHOOSE = (
    Wording("\nThe secret code of {name} is: {key}.\n", "\nThe secret code of {name} is:"),
    Wording("\nThe access number for {name} is {key}.\n", "\nThe access number for {name} is"),
)
_TEST = (
    Wording("\nThe special magic number for {name} is: {key}.\n", "\nThe special magic number for {name} is:"),
    Wording("\nPeople in {name} dial {key} for help.\n", "\nPeople in {name} dial"),
)
_VALUES = "\nThe {nth} %s of {name} is {key}.\n", "\nThe first and the second %s of {name} are"

FAMILY = (
    Task(
        "passkey",
        (Wording("\nThe door opens with {key}. Note it: {key}.\n", "\nThe door opens with"),),
        (Wording(" The pass key is {key}. Remember it. {key} is the pass key. ", " The pass key is"),),
        _keys(1, 1),
    ),
    Task("needle", _CHOOSE, _TEST, _keys(1, 1)),
    Task("multi_key", _CHOOSE, _TEST, _keys(4, 1)),
    Task("multi_query", _CHOOSE, _TEST, _keys(4, 4)),
    Task(
        "multi_value",
        (Wording(_VALUES[0] % "code", _VALUES[1] % "code"),),
        (Wording(_VALUES[0] % "magic number", _VALUES[1] % "magic number"),),
        _values,
    ),
    Task(
        "key_value",
        (Wording("\n{name}: {key}\n", "\n{name}:"),),
        (Wording('\n"{name}" = {key};\n', '\n"{name}" ='),),
        _keys(8, 4),
    ),
    Task("turns", _CHOOSE, _TEST, _keys(4, 2), turns=True),
)
