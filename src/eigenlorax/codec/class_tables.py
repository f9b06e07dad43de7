"""The distributions that `entropy` encodes integers with: one table of frequencies for each class.

Class c is a logistic distribution of scale 2^(c/4 − 4) over the integers. Each class from `CLASSES` on is a
distribution of groups of `GROUP` integers from −1 to 1 that are coded as one: most numbers of a version do not change,
and a group takes as long to code as a number.
"""

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache

import numpy as np

CLASSES = 128
GROUP = 4
"""Integers of a group. A group is the number Σ (integer + 1) 3^i, with the first integer at i = 0."""
GROUP_CLASSES = 48
"""Classes of groups. An integer of class `CLASSES` + g is not zero with a probability of 0.75 · 2^(−g/4)."""
ALL_CLASSES = CLASSES + GROUP_CLASSES
PRECISION = 15
"""Bits of a probability."""
_FIRST_RAW_CLASS = 24
"""From this class on, the low bits of an integer are nearly uniform and are written as they are, without a model. One
bit more every fourth class keeps the tables of all wide classes equally small."""
TOTAL = 1 << PRECISION
"""The sum of the frequencies of a class."""
# far more digits than an integer bound needs, so that no two machines round it differently
_DECIMALS = Context(prec=30)


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The distribution of a class, over the symbols that are left of integers without their low bits.

    Attributes:
        raw_bits: Number of low bits that are written as they are.
        first: The smallest symbol.
        bounds: Cumulated frequencies, (symbols + 2,). The last interval is that of the escape, which represents all
            integers beyond the table.
    """

    raw_bits: int
    first: int
    bounds: np.ndarray

    @property
    def escape(self) -> int:
        """The index of the escape."""
        return len(self.bounds) - 2


@cache
def class_table(class_index: int) -> ClassTable:
    """Return the table of a class, which is part of the format.

    Decimal arithmetic gives the same table on every machine; `exp` of floats does not.

    Args:
        class_index: The class, from 0 to `ALL_CLASSES` − 1.
    """
    if class_index >= CLASSES:
        return _group_table(class_index - CLASSES)
    raw_bits = max(0, (class_index - _FIRST_RAW_CLASS) // 4 + 1)
    # the program that calls may have set another precision
    with localcontext(_DECIMALS):
        scale = Decimal(2) ** (Decimal(class_index) / 4 - 4)
        # beyond 16 scales, the logistic distribution has less than one span in 2^23
        reach = int(16 * scale / 2**raw_bits) + 2
        symbols = 2 * reach + 1
        # every symbol and the escape have at least one count; the remaining counts follow the logistic distribution
        shared = TOTAL - symbols - 1
        bounds = [0]
        # a symbol is an interval of integers, whose bounds are at half-integers
        edge = (Decimal((1 - reach) * 2**raw_bits) - Decimal("0.5")) / scale
        odds, ratio = (-edge).exp(), (-Decimal(2**raw_bits) / scale).exp()
        for index in range(1, symbols):
            bounds.append(index + int(shared / (1 + odds) + Decimal("0.5")))
            # `exp` takes fifty times as long as a product; the error of all of them is in the 27th digit
            odds *= ratio
    return ClassTable(raw_bits, -reach, np.array([*bounds, symbols + shared, TOTAL], dtype=np.int64))


def change_probability(group_class: int) -> Decimal:
    """Return the probability that an integer of a class of groups is not zero."""
    with localcontext(_DECIMALS):
        return Decimal("0.75") * Decimal(2) ** (Decimal(-group_class) / 4)


def _group_table(group_class: int) -> ClassTable:
    """Return the table of a class of groups: 3^`GROUP` symbols and the escape, which does not occur."""
    symbols = 3**GROUP
    with localcontext(_DECIMALS):
        changed = change_probability(group_class)
        shared = TOTAL - symbols - 1
        frequencies = []
        for symbol in range(symbols):
            count = sum(symbol // 3**place % 3 != 1 for place in range(GROUP))
            probability = (changed / 2) ** count * (1 - changed) ** (GROUP - count)
            frequencies.append(1 + int(shared * probability))
    # the group of zeros takes what rounding leaves
    frequencies[symbols // 2] += TOTAL - 1 - sum(frequencies)
    return ClassTable(0, 0, np.concatenate([[0], np.cumsum(frequencies), [TOTAL]]).astype(np.int64))
