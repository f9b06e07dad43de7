"""Search for the coarsest quantisation within an error bound: first on a sample of the numbers, then on all of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ...errors import OptionError
from .blocks import Block, Quantisation, QuantisedBlock, join
from .lattice import LEVELS_PER_OCTAVE, MAX_LEVEL

T = TypeVar("T")

MAX_MULTIPLIER = 1.2
"""Largest Lagrange multiplier of `round_by_rate`. Greater ones save nothing."""
WASTEFUL_MULTIPLIER = 0.5
"""Multiplier from which steps of whole octaves may be so much finer than necessary that others take fewer bits."""
SAMPLE_NUMBERS = 1 << 16
"""About how many numbers of a version are looked at to choose its level."""
MIN_COLUMNS = 16
"""Smallest number of sampled columns."""
MAX_RISE = 2 * LEVELS_PER_OCTAVE
"""Largest increase of the level at a time."""
MAX_LEVEL_TURNS = 12
"""Maximum number of levels that are tried to find the highest one."""
SAMPLED_SHARE = 0.996
"""Share of the squared error that is allowed to a sample, because it only estimates the error."""
SUFFICIENT_SHARE = 0.98
"""Share of the squared error that ends the search."""
MAX_ATTEMPTS = 12
"""Maximum number of attempts to meet the error."""
MAX_REFINEMENTS = 4
"""Number of attempts after which one that meets the error ends the search, however far below it is."""
_BISECTIONS = 8


class SampledRows:
    """A sample of the columns of several blocks, to estimate errors and bits.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        rows = sum(len(block.weights) for block in blocks)
        columns = max(MIN_COLUMNS, SAMPLE_NUMBERS // max(rows, 1))
        by_width: dict[int, list[Block]] = {}
        for block in blocks:
            sampled = block.columns(columns)
            by_width.setdefault(sampled.values.shape[1], []).append(sampled)
        # few large arrays take less time than many small ones
        self._blocks = [join(alike) for alike in by_width.values()]
        self._numbers = sum(block.values.size for block in blocks)

    def square(self, quantisation: Quantisation) -> float:
        """Return the estimated weighted squared error of all blocks."""
        return sum(each.square for each in self._quantise(quantisation))

    def bits(self, quantisation: Quantisation) -> float:
        """Return about how many bits all blocks take."""
        return sum(each.bits for each in self._quantise(quantisation))

    def _quantise(self, quantisation: Quantisation) -> list[QuantisedBlock]:
        return [block.quantise(quantisation) for block in self._blocks]

    def choose(self, limit: float, earlier_level: int | None) -> Quantisation:
        """Return the quantisation that is estimated to take the fewest bits within an error.

        Args:
            limit: Largest weighted squared error.
            earlier_level: Level of the version that predicts the rows; None for none.
        """
        # uniform noise of a step size s has the mean square s² / 12
        noise = math.sqrt(12 * limit / max(self._numbers, 1))
        start = math.floor(LEVELS_PER_OCTAVE * math.log2(noise)) if earlier_level is None else earlier_level
        start = max(-MAX_LEVEL, min(start, MAX_LEVEL))
        if earlier_level is None:
            return self._best(start, limit, (0, 1), is_nested=False)
        nested = self._best(start, limit, (0, 2, 4), is_nested=True)
        if nested.multiplier < WASTEFUL_MULTIPLIER:
            return nested
        return min(nested, self._best(start, limit, (0, 1), is_nested=False), key=self.bits)

    def _best(self, start: int, limit: float, distances: Sequence[int], *, is_nested: bool) -> Quantisation:
        """Return the quantisation of the fewest bits whose level is so far below the highest one."""
        highest = self._highest_level(start, limit, is_nested)
        candidates = [
            Quantisation(level, self.multiplier(level, limit, is_nested), is_nested)
            for level in (max(highest - below, -MAX_LEVEL) for below in distances)
        ]
        return min(candidates, key=self.bits)

    def _highest_level(self, start: int, limit: float, is_nested: bool) -> int:
        """Return about the highest level within an error, without a multiplier."""
        level, is_rising = start, True
        for _ in range(MAX_LEVEL_TURNS):
            square = self.square(Quantisation(level, 0.0, is_nested))
            # the squared error grows by two octaves if the level does by one
            change = math.floor(LEVELS_PER_OCTAVE * math.log2(limit / max(square, 1e-300)) / 2)
            if square > limit:
                is_rising = False
                level += min(change, -1)
            elif is_rising and change > 0:
                level += min(change, MAX_RISE)
            else:
                break
        return max(-MAX_LEVEL, min(level, MAX_LEVEL))

    def multiplier(self, level: int, limit: float, is_nested: bool) -> float:
        """Return about the largest multiplier within an error, at a level; 0 if there is none."""
        if self.square(Quantisation(level, MAX_MULTIPLIER, is_nested)) <= limit:
            return MAX_MULTIPLIER
        low, high = 0.0, MAX_MULTIPLIER
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_within = self.square(Quantisation(level, middle, is_nested)) <= limit
            low, high = (middle, high) if is_within else (low, middle)
        return low


@dataclass(frozen=True, slots=True)
class SearchResult(Generic[T]):
    """The coarsest attempt within an error.

    Attributes:
        rows: The quantised rows.
        quantisation: Their quantisation.
        square: Their exact squared error.
    """

    rows: T
    quantisation: Quantisation
    square: float


def search(
    blocks: Sequence[Block],
    limit: float,
    earlier_level: int | None,
    attempt: Callable[[Quantisation], tuple[T, float]],
) -> SearchResult[T]:
    """Return the coarsest attempt within an error.

    Args:
        blocks: The rows.
        limit: Largest squared error.
        earlier_level: Level of the version that predicts the rows; None for none.
        attempt: Quantises all rows, and returns the quantised rows and their exact squared error.

    Raises:
        OptionError: No quantisation meets the error.
    """
    sample = SampledRows(blocks)
    quantisation = sample.choose(SAMPLED_SHARE * limit, earlier_level)
    best: SearchResult[T] | None = None
    for turn in range(1, MAX_ATTEMPTS + 1):
        rows, square = attempt(quantisation)
        if square <= limit and (best is None or square >= best.square):
            best = SearchResult(rows, quantisation, square)
        if best is not None and (
            best.square >= SUFFICIENT_SHARE * limit
            or best.quantisation.multiplier >= MAX_MULTIPLIER
            or turn >= MAX_REFINEMENTS
        ):
            break
        # the sample errs by about the same factor at other multipliers
        ratio = square / max(sample.square(quantisation), 1e-300)
        if square > limit and not quantisation.multiplier:
            fall = LEVELS_PER_OCTAVE * math.log2(square / limit) / 2 if math.isfinite(square) else LEVELS_PER_OCTAVE
            level = max(quantisation.level - math.ceil(max(fall, 1)), -MAX_LEVEL)
            quantisation = replace(quantisation, level=level)
        else:
            allowed = SAMPLED_SHARE * limit / max(ratio, 1e-300)
            multiplier = sample.multiplier(quantisation.level, allowed, quantisation.is_nested)
            quantisation = replace(quantisation, multiplier=multiplier)
    if best is None:
        raise OptionError("the error bound cannot be met by integers of 31 bits")
    return best
