"""Facts hidden in a text: passkeys, needles with one and several keys, values and queries, key-value recall, turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from sparse_prune.evaluation.tasks.pools import NAMES, number
from sparse_prune.evaluation.tasks.task import Facts, Split, Task, Wording


def _ask(told: Sequence[tuple[Wording, str, str]], asked: int) -> Facts:
    """Facts of wording, name and key each, and questions on the first of them."""
    facts = [wording.fact.format(name=name, key=key) for wording, name, key in told]
    asks: list[tuple[str, str, int | None]]
    asks = [
        (wording.question.format(name=name), f" {key}", index)
        for index, (wording, name, key) in enumerate(told[:asked])
    ]
    return Facts(facts, asks)


def _keys(keys: int, asked: int) -> Callable[[Random, Wording, Split], Facts]:
    def make(random: Random, wording: Wording, split: Split) -> Facts:
        return _ask([(wording, name, number(random, split)) for name in random.sample(NAMES[split], keys)], asked)

    return make


def _values(random: Random, wording: Wording, split: Split) -> Facts:
    name, keys = random.choice(NAMES[split]), [number(random, split) for _ in range(2)]
    facts = [
        wording.fact.format(name=name, key=key, nth=nth) for nth, key in zip(("first", "second"), keys, strict=True)
    ]
    return Facts(facts, [(wording.question.format(name=name), f" {keys[0]} and {keys[1]}", None)])


_NAMED = (  # for choosing, for testing
    (
        Wording("\nThe secret code of {name} is: {key}.\n", "\nThe secret code of {name} is:"),
        Wording("\nThe access number for {name} is {key}.\n", "\nThe access number for {name} is"),
        Wording(" Whoever travels to {name} needs ticket {key}. ", " Whoever travels to {name} needs ticket"),
        Wording("\n{name} has a population of {key}.\n", "\n{name} has a population of"),
        Wording("\nQ: Which locker belongs to {name}? A: {key}\n", "\nQ: Which locker belongs to {name}? A:"),
        Wording(" The train to {name} leaves from stop {key}. ", " The train to {name} leaves from stop"),
        Wording("\nIf someone asks about {name}, answer {key}.\n", "\nIf someone asks about {name}, answer"),
        Wording("\n# {name} was last seen at {key}\n", "\n# {name} was last seen at"),
    ),
    (
        Wording("\nThe special magic number for {name} is: {key}.\n", "\nThe special magic number for {name} is:"),
        Wording("\nPeople in {name} dial {key} for help.\n", "\nPeople in {name} dial"),
    ),
)
_UNNAMED = (  # for choosing, for testing
    (
        Wording("\nThe door opens with {key}. Note it: {key}.\n", "\nThe door opens with"),
        Wording(" My account number is {key}. ", " My account number is"),
        Wording("\nThe alarm stops at {key}. Again: {key} stops it.\n", "\nThe alarm stops at"),
        Wording(" Do not forget {key}, the number of the safe. ", " The number of the safe is"),
    ),
    (Wording(" The pass key is {key}. Remember it. {key} is the pass key. ", " The pass key is"),),
)
_TABLES = (  # for choosing, for testing
    (
        Wording("\n{name}: {key}\n", "\n{name}:"),
        Wording("\n- {name} -> {key}\n", "\n- {name} ->"),
        Wording("\n<item id='{name}'> {key} </item>\n", "\n<item id='{name}'>"),
    ),
    (Wording('\n"{name}" = {key};\n', '\n"{name}" ='),),
)
_VALUES = "\nThe {nth} %s of {name} is {key}.\n", "\nThe first and the second %s of {name} are"

FAMILY = (
    Task("passkey", *_UNNAMED, _keys(1, 1)),
    Task("needle", *_NAMED, _keys(1, 1)),
    Task("multi_key", *_NAMED, _keys(4, 1)),
    Task("multi_query", *_NAMED, _keys(4, 4)),
    Task(
        "multi_value",
        (Wording(_VALUES[0] % "code", _VALUES[1] % "code"),),
        (Wording(_VALUES[0] % "magic number", _VALUES[1] % "magic number"),),
        _values,
    ),
    Task("key_value", *_TABLES, _keys(8, 4)),
    Task("turns", *_NAMED, _keys(4, 2), turns=True),
)


def mixed(count: int) -> Task:
    """So many facts in one text, one of them without a name, in wordings drawn for each, and all asked for in turns."""

    def make(random: Random, _: Wording, split: Split) -> Facts:
        unnamed, named, tables = (part[split == "test"] for part in (_UNNAMED, _NAMED, _TABLES))
        wordings = [random.choice(unnamed), *random.choices(named + tables, k=count - 1)]
        random.shuffle(wordings)
        names = random.sample(NAMES[split], count)
        return _ask([(w, name, number(random, split)) for w, name in zip(wordings, names, strict=True)], count)

    return Task("mixed", *_NAMED, make, turns=True)
