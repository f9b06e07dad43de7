"""The distributions that `entropy` encodes integers with: one table of frequencies for each class.

Class c is a logistic distribution of scale 2^(c/4 − 4) over the integers.
"""

from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache

import numpy as np

CLASSES = 128
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
        class_index: The class, from 0 to `CLASSES` − 1.
    """
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
        for index in range(1, symbols):
            # a symbol is an interval of integers, whose bounds are at half-integers
            edge = (Decimal((index - reach) * 2**raw_bits) - Decimal("0.5")) / scale
            bounds.append(index + int(shared / (1 + (-edge).exp()) + Decimal("0.5")))
    return ClassTable(raw_bits, -reach, np.array([*bounds, symbols + shared, TOTAL], dtype=np.int64))
