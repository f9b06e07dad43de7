"""Which rows a contest trains on, chooses learning rates by, and tests on. Nothing here knows a method."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FormatError, RowsWarning
from . import examples
from .data import Labels, Table
from .entrants import Contest
from .examples import Example

CHOICE_SEED = 2**31 - 1
"""Of the rows held out and of the trainings that choose a rate; the others have 0, 1, 2 …"""
_HELD_OUT = 5
"""One of so many rows of each class."""
_FEW = 100
ON_THE_WAY = 500
"""The most rows for the scores on the way."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a contest. whole: all for training, which are part and held_out; test: all for evaluation, of which
    way are some. held_out, way: the same whatever the seed is."""

    whole: list[Example]
    part: list[Example]
    held_out: list[Example]
    test: list[Example]
    way: list[Example]


def divide(contest: Contest, table: Table, tests: Table, labels: Labels, tokenizer: Any, most: int) -> Rows:
    """The rows of a contest as a model is fed with them. A fifth of each class for training is held out."""
    whole, test = (examples.classification(one, labels, contest.columns, tokenizer, most) for one in (table, tests))
    known = {tuple(row["input_ids"]) for row in whole}
    twice = sum(tuple(row["input_ids"]) in known for row in test)
    if twice:
        warnings.warn(
            f"{twice} of {len(test)} rows of {tests.where} are among those of {table.where} too: what is known by "
            "heart counts as learned.",
            RowsWarning,
            stacklevel=3,
        )
    held_out = _held_out([row["labels"] for row in whole])
    if any(len(contest.rates_of(name)) > 1 for name in contest.methods):
        if len({whole[place]["labels"] for place in held_out}) < 2:
            raise FormatError(
                f"{table.where} has one row a class, or little more: learning rates are chosen on rows held out, of "
                "two classes at least. More rows are needed, or one rate a method (rates=, --learning-rates METHOD=A)."
            )
        if len(held_out) < _FEW:
            warnings.warn(
                f"learning rates are chosen on {len(held_out)} rows held out of {len(whole)}: few, so that chance has "
                "a hand in it.",
                RowsWarning,
                stacklevel=3,
            )
    way = random.Random(CHOICE_SEED).sample(test, ON_THE_WAY) if len(test) > ON_THE_WAY else test  # noqa: S311
    return Rows(
        whole=whole,
        part=[row for place, row in enumerate(whole) if place not in held_out],
        held_out=[row for place, row in enumerate(whole) if place in held_out],
        test=test,
        way=way,
    )


def _held_out(numbers: Sequence[int]) -> set[int]:
    """Places of rows, of every class that has two or more."""
    chance = random.Random(CHOICE_SEED)  # noqa: S311
    found: set[int] = set()
    for number in sorted(set(numbers)):
        places = [place for place, one in enumerate(numbers) if one == number]
        found.update(chance.sample(places, max(1, len(places) // _HELD_OUT) if len(places) > 1 else 0))
    return found
