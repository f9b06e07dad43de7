"""How a figure grows with a size: the exponent of a power, by least squares on logarithms."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Growth:
    """value ≈ factor · size ** exponent, fitted on `sizes`: the upper half of those that were measured.

    standard_error: that of the exponent, by the regression; None for two points, which a power always fits.
    """

    exponent: float
    factor: float
    sizes: tuple[float, ...]
    standard_error: float | None = None

    def at(self, size: float) -> float:
        return self.factor * size**self.exponent


def fitted(points: Sequence[tuple[float, float]]) -> Growth | None:
    """The growth of (size, value) pairs; None where the upper half holds fewer than two sizes with positive values.

    A size may be there several times. Of an odd number of sizes the middle one belongs to the upper half. The lower
    half is left out because what a call costs whatever its size would make the exponent smaller than it is.
    """
    sizes = sorted({size for size, _ in points})
    upper = [point for point in sorted(points) if point[0] in sizes[len(sizes) // 2 :] and min(point) > 0]
    measured = tuple(sorted({size for size, _ in upper}))
    if len(measured) < 2:
        return None
    logs, values = zip(*((math.log(size), math.log(value)) for size, value in upper), strict=True)
    exponent, offset = statistics.linear_regression(logs, values)
    error = None
    if len(logs) > 2:
        squares = sum((value - offset - exponent * log) ** 2 for log, value in zip(logs, values, strict=True))
        spread = sum((log - statistics.fmean(logs)) ** 2 for log in logs)
        error = math.sqrt(squares / (len(logs) - 2) / spread)
    return Growth(exponent, math.exp(offset), measured, error)
