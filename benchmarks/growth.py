"""How a figure grows with a size: the exponent of a power, by least squares on logarithms."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Growth:
    """value ≈ factor · size ** exponent, fitted on `sizes`: the upper half of those that were measured."""

    exponent: float
    factor: float
    sizes: tuple[float, ...]

    def at(self, size: float) -> float:
        return self.factor * size**self.exponent


def fitted(points: Sequence[tuple[float, float]]) -> Growth | None:
    """The growth of (size, value) pairs; None where the upper half holds fewer than two positive values.

    Of an odd number of sizes the middle one belongs to the upper half. The lower half is left out because what a call
    costs whatever its size would make the exponent smaller than it is.
    """
    upper = [point for point in sorted(points)[len(points) // 2 :] if min(point) > 0]
    if len({size for size, _ in upper}) < 2:
        return None
    sizes, values = zip(*upper, strict=True)
    exponent, offset = statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values])
    return Growth(exponent, math.exp(offset), sizes)
